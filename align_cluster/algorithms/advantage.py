"""Advantages: pure functions of all rewards of a step, in fp64."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from align_cluster.config.base import Section
from align_cluster.types import Credit

FLAT = 1e-6  # a group whose rewards spread less than this teaches nothing


class AdvantageConfig(Section):
    """How rewards become advantages. The mean is always the group's.

    `std: group` divides by each group's own deviation (GRPO); `global` by that of all raw rewards of the step
    (Flow-GRPO's and DiffusionNFT's default). `eps` is added to the deviation.
    """

    std: Literal["group", "global"] = "group"
    eps: Annotated[float, Field(gt=0)] = 1e-4


def advantages(rewards: np.ndarray, valid: np.ndarray, std: str, eps: float) -> np.ndarray:
    """Advantages [P, G] of rewards [P, G] over P groups; invalid entries count nowhere and get 0.

    Groups that are flat (max - min < 1e-6) or have fewer than two valid rewards get exactly 0.
    """
    r = np.where(valid, rewards, np.nan).astype(np.float64)
    count = valid.sum(1, keepdims=True)
    mean = np.nansum(r, 1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(valid, r - mean, 0.0)
    if std == "group":
        scale = np.sqrt((centred**2).sum(1, keepdims=True) / np.maximum(count, 1))
    else:
        scale = np.nanstd(r) if valid.any() else 0.0
    return np.where(live_groups(rewards, valid)[:, None], centred / (scale + eps), 0.0)


def live_groups(rewards: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Which groups [P] carry a signal: at least two valid rewards that differ by more than 1e-6."""
    high = np.where(valid, rewards, -np.inf).max(1)
    low = np.where(valid, rewards, np.inf).min(1)
    return (valid.sum(1) > 1) & (high - low > FLAT)


def credit(rewards: np.ndarray, valid: np.ndarray, config: AdvantageConfig) -> Credit:
    """Advantages of one step with the statistics that reports show."""
    values = advantages(rewards, valid, config.std, config.eps)
    spread = [row[keep].std() for row, keep in zip(rewards, valid, strict=True) if keep.any()]
    return Credit(
        values.astype(np.float32),
        valid,
        {
            "group/std": float(np.mean(spread)) if spread else 0.0,
            "group/zero_std_ratio": 1.0 - float(live_groups(rewards, valid).mean()),
            "group/masked": 1.0 - float(valid.mean()),
        },
    )
