"""Scores images with all rewards of a run. A plain class: the actor around it is somebody else's."""

import time
from collections.abc import Mapping

import numpy as np
import torch

from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import RewardSection
from align_cluster.rewards.batching import score_together
from align_cluster.rewards.failure import score_with
from align_cluster.rewards.mix import concatenate
from align_cluster.types import Prompt, Scores


class RewardWorker:
    """Loads every reward of `configs` (by its name in the run) and keeps it. Loading errors rise: the run cannot start.

    A reward that fails is tried again as its `on_failure` says, and then costs the run those images of that reward and
    no more: they are marked not valid, and the kind and message of the failure go to the caller. At most `batch` images
    are scored at a time.
    """

    def __init__(
        self, configs: Mapping[str, RewardSection], threads: int = 1, device: str = "cpu", batch: int | None = None
    ) -> None:
        torch.set_num_threads(threads)
        self.batch = batch
        self.rewards = {name: REWARDS[config.kind](config) for name, config in configs.items()}
        for reward in self.rewards.values():
            reward.load(device, threads)

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        """Scores of images uint8 [B, H, W, 3], one prompt an image; details are named "<reward>/<detail>"."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts; give one prompt an image")
        size = self.batch or max(1, len(images))
        starts = range(0, max(1, len(images)), size)
        parts = [self._score(images[start : start + size], prompts[start : start + size]) for start in starts]
        return concatenate(parts) if len(parts) > 1 else parts[0]

    def score_chunks(self, prompts: list[list[Prompt]], *images: np.ndarray) -> list[Scores]:
        """Scores of several chunks that are scored together; a failure of one costs the others nothing."""
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
