"""Scores where scoring may fail: tries again, halves the batch, and tells what has no score. No failure is a number."""

import time
from collections.abc import Callable

import numpy as np
import torch

from align_cluster.rewards.base import FailurePolicy, Result, RewardError
from align_cluster.rewards.mix import concatenate
from align_cluster.types import Failure, FailureKind, Prompt, Scores

Score = Callable[[np.ndarray, list[Prompt]], Result]


def classify(error: Exception) -> FailureKind:
    """Return the kind of an error that a reward raised."""
    if isinstance(error, RewardError):
        return error.kind
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "oom"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ConnectionError):
        return "unavailable"
    return "model_error"


def score_with(
    score: Score, images: np.ndarray, prompts: list[Prompt], policy: FailurePolicy
) -> tuple[Result, Failure | None]:
    """Return scores of B images, and the failure of those that have none. Whatever can be scored gets its score.

    A batch that does not fit into memory, or has an image that cannot be read, is halved until the rest has scores.
    Other failures are tried again as the policy says.
    """
    for attempt in range(policy.retries + 1):
        if attempt:
            time.sleep(policy.backoff_s * 2 ** (attempt - 1))
        try:
            return checked(score(images, prompts), len(images)), None
        except Exception as error:
            kind, message = classify(error), f"{type(error).__name__}: {error}"
        if kind in ("oom", "bad_input") and len(images) > 1:
            _free()
            cut = len(images) // 2
            parts = [score_with(score, images[rows], prompts[rows], policy) for rows in (slice(cut), slice(cut, None))]
            return _joined(parts)
        if kind == "bad_input":
            break
    nothing = Result(np.full(len(images), np.nan), np.zeros(len(images), dtype=bool))
    return nothing, Failure(kind, message, len(images))


def checked(result: Result, count: int) -> Result:
    """Return the result. ValueError says how it breaks the contract of a reward."""
    columns = {"values": result.values, "valid": result.valid, **result.details}
    for name, column in columns.items():
        if np.shape(column) != (count,):
            raise ValueError(f"{name} has shape {np.shape(column)} for {count} images")
    broken = int((result.valid & ~np.isfinite(result.values)).sum())
    if broken:
        raise ValueError(f"{broken} of {count} values are not finite")
    return result


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _joined(parts: list[tuple[Result, Failure | None]]) -> tuple[Result, Failure | None]:
    name = ""  # The scores are of one reward, whose name is not known here.
    whole = concatenate(
        [Scores({name: r.values}, {name: r.valid}, {name: f} if f else {}, r.details) for r, f in parts]
    )
    return Result(whole.values[name], whole.valid[name], whole.details), whole.failures.get(name)
