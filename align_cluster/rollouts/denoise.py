"""The denoising loop: one batched chunk from noise to final latents, recording only what was asked for."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from align_cluster.rollouts.steps import Step

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [B, C, H, W], sigma [B]) -> output like x
Policy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]  # the same, or None where it would be equal


class Steer(Protocol):
    """What a loop is asked to change on its way."""

    def select(self, k: int, x: torch.Tensor) -> Sequence[int] | None:
        """Rows of x [B, C, H, W] that step k goes on with, one or more times each; None for all as they are."""

    def push(self, k: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What step k takes in the place of the network's output, like it."""


@dataclass(frozen=True)
class Path:
    """Final latents [B, C, H, W] and, for the K recorded steps of each sample, where they began and, where the kind of
    step has a density, what they drew, its log-density [B, K] and, if asked for, that density's mean."""

    x0: torch.Tensor
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    means: torch.Tensor | None = None


def initial_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
    """One standard normal tensor a generator, drawn on the CPU so that it does not depend on device or batch."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def starting_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    """The noise that rollouts with these seeds begin with, on the CPU. It never travels: anybody can make it again."""
    return initial_noise([torch.Generator().manual_seed(seed) for seed in seeds], shape)


def path_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """The streams of the steps' noises: other than those of the initial noises, which may be shared or have the same
    seeds."""
    return [torch.Generator().manual_seed(seed ^ 1) for seed in seeds]


@torch.no_grad()
def denoise(
    velocity: Velocity,
    step: Step,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    noises: Sequence[int] | None = None,
    noisy: Collection[int] | None = None,
    indices: np.ndarray | None = None,
    policy: Policy | None = None,
    means: bool = False,
    device: torch.device | str = "cpu",
    steer: Steer | None = None,
) -> Path:
    """Draw len(seeds) samples with a step of `rollouts.steps`, over that step's noise levels.

    `noises` are the seeds of the initial noises (default: `seeds`), `noisy` the steps that are stochastic (default:
    all, where the kind has a density). `indices` [B, K] are the steps to record, each sample's own; `means` asks
    for their densities' means, too. Where samples are drawn under another condition than the one that is trained,
    `policy` predicts for the trained one: log-densities and means are then the policy's, and what was drawn stays what
    it is. `steer` changes outputs and chooses rows, where nothing is recorded; copies of a row take turns on its stream
    of noise, so they part at once.
    """
    generators = path_generators(seeds)
    x = starting_noise(noises if noises is not None else seeds, shape).to(device)
    record = Recorder(indices, x, step.has_density, means) if indices is not None and indices.size else None
    for k in range(len(step.sigmas) - 1):
        if steer and (rows := steer.select(k, x)) is not None:
            x, generators = x[rows], [generators[row] for row in rows]
        steps = torch.full((len(x),), k, device=device)
        level = step.level(steps)
        v = velocity(x, level)
        if steer:
            v = steer.push(k, x, v)
        stochastic = step.is_noisy(k) and (noisy is None or k in noisy)
        x_next = step.advance(k, x, v, initial_noise(generators, shape).to(device) if stochastic else None)
        if record is not None and (indices == k).any():
            if step.has_density:
                trained = policy(x, level) if policy is not None else None
                mean, std, _ = step.mean(steps, x, v if trained is None else trained)
                record.put(k, x, x_next, step.density(mean, std, x_next), mean)
            else:
                record.put(k, x)
        x = x_next
    return Path(x) if record is None else Path(x, record.before, record.after, record.log_probs, record.means)


class Recorder:
    """Fills the records of `indices` [B, K] step by step."""

    def __init__(self, indices: np.ndarray, x: torch.Tensor, density: bool, means: bool) -> None:
        self.indices = indices
        self.before = x.new_empty(*indices.shape, *x.shape[1:])
        self.after = torch.empty_like(self.before) if density else None
        self.means = torch.empty_like(self.before) if density and means else None
        self.log_probs = x.new_empty(indices.shape) if density else None

    def put(
        self,
        k: int,
        x: torch.Tensor,
        x_next: torch.Tensor | None = None,
        log_prob: torch.Tensor | None = None,
        mean: torch.Tensor | None = None,
    ) -> None:
        rows, slots = (torch.from_numpy(places).to(x.device) for places in np.nonzero(self.indices == k))
        for kept, values in (
            (self.before, x),
            (self.after, x_next),
            (self.log_probs, log_prob),
            (self.means, mean),
        ):
            if kept is not None:
                kept[rows, slots] = values[rows]
