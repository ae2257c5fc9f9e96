"""Joins the scores of many chunks and of several workers into one table.

`algorithms/advantage.py` weighs the rewards and makes an advantage of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from align_cluster.errors import UserError
from align_cluster.rewards.base import RewardSection
from align_cluster.types import Failure, Scores


def unscored(rewards: Sequence[str], failure: Failure) -> Scores:
    """Return scores in which no reward has a value for the failure's images."""
    count = failure.images
    values, valid = np.full(count, np.nan), np.zeros(count, bool)
    return Scores(dict.fromkeys(rewards, values), dict.fromkeys(rewards, valid), dict.fromkeys(rewards, failure))


def beside(parts: Sequence[Scores], order: Sequence[str]) -> Scores:
    """Join scores of the same images by different workers; the rewards stand in `order`, whichever came first."""
    columns = {
        part: {
            name: found for name in order for scores in parts if (found := getattr(scores, part).get(name)) is not None
        }
        for part in ("values", "valid", "failures", "seconds")
    }
    details = {
        name: column
        for reward in order
        for scores in parts
        for name, column in scores.details.items()
        if name.startswith(f"{reward}/")
    }
    return Scores(**columns, details=details)


def concatenate(chunks: Sequence[Scores]) -> Scores:
    """Join the scores of all N images of the chunks, in order.

    Where a chunk lacks a column, its entries are NaN; where it lacks a reward, they are not valid.
    """
    sizes = [_size(scores) for scores in chunks]
    columns = {
        part: {
            name: np.concatenate(
                [
                    getattr(scores, part).get(name, np.full(size, empty))
                    for scores, size in zip(chunks, sizes, strict=True)
                ]
            )
            for name in dict.fromkeys(name for scores in chunks for name in getattr(scores, part))
        }
        for part, empty in (("values", np.nan), ("valid", False), ("details", np.nan))
    }
    failures: dict[str, Failure] = {}
    for name, failure in (item for scores in chunks for item in scores.failures.items()):
        first = failures.get(name, failure)
        failures[name] = replace(first, images=failure.images + (first.images if name in failures else 0))
    seconds: dict[str, float] = {}
    for name, spent in (item for scores in chunks for item in scores.seconds.items()):
        seconds[name] = seconds.get(name, 0.0) + spent
    return Scores(**columns, failures=failures, seconds=seconds)


def table(
    chunks: Sequence[Scores], rewards: Mapping[str, RewardSection]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what the R trained rewards say about all N images, in order: values, applies, valid and weights.

    values fp64 [R, N], NaN where there is no score. applies bool [R, N] is False where a reward does not judge the
    prompt: it is left out there, the same for all members of a group. valid bool [N] is False where a reward failed,
    because a mix with a part missing would compare badly with the rest of the group, and where no reward applies.
    weights fp64 [R].
    """
    trained = [name for name, config in rewards.items() if config.role == "train"]
    if not trained:
        raise UserError("rewards: all have role 'monitor', so there is nothing to train on; give one role: train")
    values, applies, valid = [], [], []
    for scores in chunks:
        ok = np.stack([scores.valid[name] for name in trained])
        failed = np.array([name in scores.failures for name in trained])[:, None] & ~ok
        values.append(np.where(ok, np.stack([scores.values[name] for name in trained]), np.nan))
        applies.append(ok)
        valid.append(ok.any(0) & ~failed.any(0))
    weights = np.array([rewards[name].weight for name in trained])
    return np.concatenate(values, 1), np.concatenate(applies, 1), np.concatenate(valid), weights


def lost(chunks: Sequence[Scores], rewards: Mapping[str, RewardSection]) -> np.ndarray:
    """Return which images a trained reward with `on_failure.then: drop_group` failed on, as bool [N].

    RuntimeError says which reward with `then: fail` failed.
    """
    dropped = []
    for scores in chunks:
        drop = np.zeros(_size(scores), dtype=bool)
        for name, failure in scores.failures.items():
            policy = rewards[name].on_failure.then if rewards[name].role == "train" else "mask"
            if policy == "fail":
                raise RuntimeError(
                    f"rewards.{name} has no score for {failure.images} images ({failure.kind}: {failure.message}), and "
                    f"rewards.{name}.on_failure.then is fail"
                )
            if policy == "drop_group":
                drop |= ~scores.valid[name]
        dropped.append(drop)
    return np.concatenate(dropped)


def _size(scores: Scores) -> int:
    return len(next(iter(scores.valid.values())))
