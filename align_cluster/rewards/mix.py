"""Joins the scores of many chunks and of several workers into one table.

`algorithms/advantage.py` weighs the rewards and makes an advantage of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from align_cluster.errors import UserError
from align_cluster.rewards.base import RewardSection
from align_cluster.types import Failure, FailureKind, Scores


def unscored(rewards: Sequence[str], kind: FailureKind, message: str, count: int) -> Scores:
    """Return scores in which no reward has a value for `count` images, because of one failure."""
    values, valid, failure = np.full(count, np.nan), np.zeros(count, bool), Failure(kind, message, tuple(range(count)))
    return Scores(dict.fromkeys(rewards, values), dict.fromkeys(rewards, valid), dict.fromkeys(rewards, failure))


def part_of(scores: Scores, rows: slice) -> Scores:
    """Return the scores of consecutive rows, with their share of the computing time and of the failures."""
    share = (rows.stop - rows.start) / _size(scores)
    failures = {
        name: replace(failure, rows=tuple(row - rows.start for row in failure.rows if rows.start <= row < rows.stop))
        for name, failure in scores.failures.items()
    }
    return Scores(
        values={name: column[rows] for name, column in scores.values.items()},
        valid={name: column[rows] for name, column in scores.valid.items()},
        failures={name: failure for name, failure in failures.items() if failure.rows},
        details={name: column[rows] for name, column in scores.details.items()},
        seconds={name: share * spent for name, spent in scores.seconds.items()},
    )


def without(scores: Scores, rows: Sequence[int]) -> Scores:
    """Return the scores with none for these rows, which are images of nothing. That is no failure of a reward."""
    if not rows:
        return scores
    kept = np.ones(_size(scores), bool)
    kept[list(rows)] = False
    failures = {
        name: replace(failure, rows=tuple(row for row in failure.rows if kept[row]))
        for name, failure in scores.failures.items()
    }
    return replace(
        scores,
        values={name: np.where(kept, column, np.nan) for name, column in scores.values.items()},
        valid={name: column & kept for name, column in scores.valid.items()},
        failures={name: failure for name, failure in failures.items() if failure.rows},
        details={name: np.where(kept, column, np.nan) for name, column in scores.details.items()},
    )


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
    for start, scores in zip(np.cumsum([0, *sizes]).tolist(), chunks, strict=False):
        for name, failure in scores.failures.items():
            first, rows = failures.get(name, replace(failure, rows=())), (start + row for row in failure.rows)
            failures[name] = replace(first, rows=(*first.rows, *rows))
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
        ok, failed = np.stack([scores.valid[name] for name in trained]), np.zeros(_size(scores), bool)
        for name in trained:
            failed[_failed(scores, name)] = True
        values.append(np.where(ok, np.stack([scores.values[name] for name in trained]), np.nan))
        applies.append(ok)
        valid.append(ok.any(0) & ~failed)
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
                drop[_failed(scores, name)] = True
        dropped.append(drop)
    return np.concatenate(dropped)


def silent(chunks: Sequence[Scores], rewards: Mapping[str, RewardSection]) -> dict[str, Failure]:
    """Return the failure of each trained reward that has failed and has no score in any of the chunks."""
    whole = concatenate(chunks)
    return {
        name: failure
        for name, failure in whole.failures.items()
        if rewards[name].role == "train" and not whole.valid[name].any()
    }


def _failed(scores: Scores, name: str) -> list[int]:
    """Return the rows that a reward failed on. It may judge others neither, which is no failure."""
    return list(scores.failures[name].rows) if name in scores.failures else []


def _size(scores: Scores) -> int:
    return len(next(iter(scores.valid.values())))
