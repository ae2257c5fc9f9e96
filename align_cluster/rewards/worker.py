"""Scores images with all rewards of a run. A plain class: cluster/ and serving/ put actors around it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import RewardSection
from align_cluster.rewards.failure import score_with
from align_cluster.rewards.mix import concatenate
from align_cluster.types import Prompt, Scores

Part = tuple[np.ndarray, list[Prompt]]  # images uint8 [B, H, W, 3] and one prompt each


class RewardWorker:
    """Loads every reward of `configs` (by its name in the run) and keeps it. Loading errors rise: the run cannot start.

    A reward that fails is tried again as its `on_failure` says. What still fails costs the run these images of this
    reward and no more: they are marked not valid, and the caller gets the kind and message of the failure. At most
    `batch` images are scored at a time.
    """

    def __init__(
        self, configs: Mapping[str, RewardSection], threads: int = 1, device: str = "cpu", batch: int | None = None
    ) -> None:
        """Load the rewards to `device`, to run on `threads` CPU threads."""
        torch.set_num_threads(threads)
        self.batch = batch
        self.rewards = {name: REWARDS[config.kind](config) for name, config in configs.items()}
        for reward in self.rewards.values():
            reward.load(device, threads)

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3] with one prompt each; details are named "<reward>/<detail>"."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts; give one prompt an image")
        size = self.batch or max(1, len(images))
        starts = range(0, max(1, len(images)), size)
        parts = [self._score(images[start : start + size], prompts[start : start + size]) for start in starts]
        return concatenate(parts) if len(parts) > 1 else parts[0]

    def score_chunks(self, prompts: list[list[Prompt]], *images: np.ndarray) -> list[Scores]:
        """Score several chunks together; a failure of one costs the others nothing."""
        return score_together(self.score, list(zip(images, prompts, strict=True)))

    def _score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        values, valid, failures, details, seconds = {}, {}, {}, {}, {}
        for name, reward in self.rewards.items():
            started = time.perf_counter()
            result, failure = score_with(reward.score, images, prompts, reward.config.on_failure)
            if failure:
                failures[name] = failure
            values[name], valid[name] = result.values, result.valid
            details |= {f"{name}/{detail}": column for detail, column in result.details.items()}
            seconds[name] = time.perf_counter() - started
        return Scores(values, valid, failures, details, seconds)


def score_together(score: Callable[[np.ndarray, list[Prompt]], Scores], parts: Sequence[Part]) -> list[Scores]:
    """Score all parts as one batch, and return the scores of each.

    If something in the batch fails, each part is scored again alone, so that none pays for another.
    """
    if len(parts) == 1:
        return [score(*parts[0])]
    images = np.concatenate([images for images, _ in parts])
    together = score(images, [prompt for _, prompts in parts for prompt in prompts])
    if together.failures:
        return [score(images, prompts) for images, prompts in parts]
    ends = np.cumsum([len(prompts) for _, prompts in parts])
    return [_rows(together, slice(end - len(prompts), end)) for (_, prompts), end in zip(parts, ends, strict=True)]


def _rows(scores: Scores, rows: slice) -> Scores:
    share = (rows.stop - rows.start) / len(next(iter(scores.valid.values())))
    return replace(
        scores,
        values={name: column[rows] for name, column in scores.values.items()},
        valid={name: column[rows] for name, column in scores.valid.items()},
        details={name: column[rows] for name, column in scores.details.items()},
        seconds={name: share * spent for name, spent in scores.seconds.items()},
    )
