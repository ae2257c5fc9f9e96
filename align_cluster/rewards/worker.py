"""Scores images with all rewards of a run. A plain class: cluster/ and serving/ put actors around it."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import RewardSection
from align_cluster.rewards.failure import score_with
from align_cluster.rewards.mix import concatenate, part_of
from align_cluster.types import Prompt, Scores

Part = tuple[np.ndarray, list[Prompt]]  # images uint8 [B, H, W, 3] and one prompt each


class RewardWorker:
    """Loads every reward of `configs` (by its name in the run) and keeps it. Loading errors rise: the run cannot start.

    A reward that fails is tried again as its `on_failure` says, and then the batch is halved. An image that still fails
    costs the run this image of this reward and no more: it is marked not valid, and the caller gets the kind and
    message of the failure. At most `batch` images are scored at a time.
    """

    def __init__(
        self,
        configs: Mapping[str, RewardSection],
        threads: int = 1,
        device: str = "cpu",
        batch: int | None = None,
        job: str = "",
    ) -> None:
        """Load the rewards to `device`, to run on `threads` CPU threads. `job` is the name of their run, if any."""
        torch.set_num_threads(threads)
        self.batch = batch
        self.rewards = {name: REWARDS[config.kind](config) for name, config in configs.items()}
        for reward in self.rewards.values():
            reward.job = job
            reward.load(device, threads)

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3] with one prompt each; details are named "<reward>/<detail>".

        ValueError says how images or prompts are something else.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            given = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"images are {given}; give uint8 [B, H, W, 3], RGB values of 0 to 255")
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts; give one prompt an image")
        size = self.batch or max(1, len(images))
        starts = range(0, max(1, len(images)), size)
        parts = [self._score(images[start : start + size], prompts[start : start + size]) for start in starts]
        return concatenate(parts) if len(parts) > 1 else parts[0]

    def score_chunks(self, prompts: list[list[Prompt]], starts: list[int], *images: np.ndarray) -> list[Scores]:
        """Score rows of several chunks together: as many of each chunk as it has prompts, from `starts` on."""
        rows = [slice(start, start + len(own)) for start, own in zip(starts, prompts, strict=True)]
        parts = [(whole[own], asked) for whole, own, asked in zip(images, rows, prompts, strict=True)]
        return score_together(self.score, parts)

    def _score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        values, valid, failures, details, seconds = {}, {}, {}, {}, {}
        for name, reward in self.rewards.items():
            started = time.perf_counter()
            result = score_with(reward.score, images, prompts, reward.config.on_failure)
            if result.failure:
                failures[name] = result.failure
            values[name], valid[name] = result.values, result.valid
            details |= {f"{name}/{detail}": column for detail, column in result.details.items()}
            seconds[name] = time.perf_counter() - started
        return Scores(values, valid, failures, details, seconds)


def score_together(score: Callable[[np.ndarray, list[Prompt]], Scores], parts: Sequence[Part]) -> list[Scores]:
    """Score all parts as one batch, and return the scores of each, with the failures of its own rows alone."""
    if len(parts) == 1:
        return [score(*parts[0])]
    images = np.concatenate([images for images, _ in parts])
    together = score(images, [prompt for _, prompts in parts for prompt in prompts])
    ends = np.cumsum([len(prompts) for _, prompts in parts]).tolist()
    return [part_of(together, slice(end - len(prompts), end)) for (_, prompts), end in zip(parts, ends, strict=True)]
