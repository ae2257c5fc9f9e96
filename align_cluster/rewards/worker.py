"""Scores images with all rewards of a run. A plain class: the actor around it is somebody else's."""

import time
from collections.abc import Mapping

import numpy as np
import torch

from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import Result, RewardSection
from align_cluster.types import Prompt, Scores


class RewardWorker:
    """Loads every reward of `configs` (by its name in the run) and keeps it. Loading errors rise: the run cannot start.

    A reward that raises while scoring costs the run that batch of that reward and no more: the batch is marked not
    valid, and the message goes to the caller. Nothing is tried twice.
    """

    def __init__(self, configs: Mapping[str, RewardSection], threads: int = 1, device: str = "cpu") -> None:
        torch.set_num_threads(threads)
        self.rewards = {name: REWARDS[config.kind](config) for name, config in configs.items()}
        for reward in self.rewards.values():
            reward.load(device, threads)

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        """Scores of images uint8 [B, H, W, 3], one prompt an image; details are named "<reward>/<detail>"."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts; give one prompt an image")
        started = time.perf_counter()
        values, valid, failures, details = {}, {}, {}, {}
        for name, reward in self.rewards.items():
            try:
                result = _checked(reward.score(images, prompts), len(images))
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {error}"
                result = Result(np.full(len(images), np.nan), np.zeros(len(images), dtype=bool))
            values[name], valid[name] = result.values, result.valid
            details |= {f"{name}/{detail}": column for detail, column in result.details.items()}
        return Scores(values, valid, failures, details, seconds=time.perf_counter() - started)


def _checked(result: Result, count: int) -> Result:
    """The result, or ValueError where it breaks the contract of a reward."""
    columns = {"values": result.values, "valid": result.valid, **result.details}
    for name, column in columns.items():
        if np.shape(column) != (count,):
            raise ValueError(f"{name} has shape {np.shape(column)} for {count} images")
    broken = int((result.valid & ~np.isfinite(result.values)).sum())
    if broken:
        raise ValueError(f"{broken} of {count} values are not finite")
    return result
