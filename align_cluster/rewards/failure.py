"""Scores where scoring may fail: tries again, halves the batch, and tells what has no score. No failure is a number."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from align_cluster.rewards.base import MOST, FailurePolicy, Result, RewardError, sound
from align_cluster.rewards.mix import concatenate
from align_cluster.types import Failure, FailureKind, Prompt, Scores

Score = Callable[[np.ndarray, list[Prompt]], Result]


class Refused(NamedTuple):
    """Says why a reward scored none of a batch, how long its last try took, and whether it used up all tries."""

    kind: FailureKind
    message: str
    seconds: float
    tried: bool


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


def score_with(score: Score, images: np.ndarray, prompts: list[Prompt], policy: FailurePolicy) -> Result:
    """Return scores of B images, with the failure of those that have none. Whatever can be scored gets its score.

    A batch that does not fit into memory, or has an image that cannot be read, is halved until the rest has scores.
    Other failures are tried again as the policy says and then halved in the same way, without more tries, as long as
    the policy's time allows it.
    """
    return _score(score, images, prompts, policy, time.monotonic() + policy.timeout_s)


def _score(score: Score, images: np.ndarray, prompts: list[Prompt], policy: FailurePolicy, deadline: float) -> Result:
    found = _try(score, images, prompts, policy)
    if isinstance(found, Result):
        return found
    # Both halves together take about as long as the whole, and twice as long where each waits for a service. A worker
    # that is over its time is replaced, and its batch then has no scores at all.
    if len(images) < 2 or time.monotonic() + 2 * found.seconds > deadline:
        return nothing(found.kind, found.message, len(images))
    _free()
    if found.tried:
        policy = policy.model_copy(update={"retries": 0})
    cut = len(images) // 2
    parts = [_score(score, images[half], prompts[half], policy, deadline) for half in (slice(cut), slice(cut, None))]
    return _joined(parts)


def _try(score: Score, images: np.ndarray, prompts: list[Prompt], policy: FailurePolicy) -> Result | Refused:
    """Return scores of a batch, after as many tries as the policy allows and the kind of failure makes sense of."""
    for attempt in range(policy.retries + 1):
        if attempt:
            time.sleep(policy.backoff_s * 2 ** (attempt - 1))
        started = time.monotonic()
        try:
            return checked(score(images, prompts), len(images))
        except Exception as error:
            kind, message = classify(error), f"{type(error).__name__}: {error}"
            refused = Refused(kind, message, time.monotonic() - started, attempt == policy.retries)
        if kind == "bad_input" or (kind == "oom" and len(images) > 1):
            break  # the same batch would fail again, and its parts have all tries
    return refused


def checked(result: Result, count: int) -> Result:
    """Return the result, in which a row whose value nobody can compute with has no score.

    ValueError says how the result breaks the contract of a reward.
    """
    columns = {"values": result.values, "valid": result.valid, **result.details}
    for name, column in columns.items():
        if np.shape(column) != (count,):
            raise ValueError(f"{name} has shape {np.shape(column)} for {count} images")
    if result.failure and np.asarray(result.valid)[list(result.failure.rows)].any():
        raise ValueError(f"the failure names rows that are valid, among {result.failure.rows}")
    broken = result.valid & ~sound(result.values)
    if not broken.any():
        return result
    rows = np.flatnonzero(broken).tolist()
    message = f"ValueError: {len(rows)} of {count} values are not finite, or above {MOST:g}"
    known = result.failure or Failure("model_error", message, ())
    failure = replace(known, rows=tuple(sorted({*known.rows, *rows})))
    values = np.where(broken, np.nan, result.values)
    return replace(result, values=values, valid=result.valid & ~broken, failure=failure)


def nothing(kind: FailureKind, message: str, count: int) -> Result:
    """Return the result of a reward that could score none of `count` images."""
    failure = Failure(kind, message, tuple(range(count)))
    return Result(np.full(count, np.nan), np.zeros(count, dtype=bool), failure=failure)


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _joined(parts: list[Result]) -> Result:
    name = ""  # The scores are of one reward, whose name is not known here.
    whole = concatenate(
        [Scores({name: r.values}, {name: r.valid}, {name: r.failure} if r.failure else {}, r.details) for r in parts]
    )
    return Result(whole.values[name], whole.valid[name], whole.details, whole.failures.get(name))
