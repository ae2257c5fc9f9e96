"""The denoising loop: it takes one chunk from noise to final latents and records only the requested steps."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch

from align_cluster.rollouts.steps import Step
from align_cluster.streams import stream

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [B, C, H, W], sigma [B]) -> output like x
Policy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]  # the same; None if it equals the velocity


class Steer(Protocol):
    """Changes the course of a denoising loop: it chooses rows and modifies outputs."""

    def select(self, k: int, x: torch.Tensor) -> Sequence[int] | None:
        """Return the rows of x [B, C, H, W] that step k continues with, each one or more times; None keeps all."""

    def push(self, k: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return what step k takes in place of the network's output, in the output's shape."""


@dataclass(frozen=True)
class Path:
    """Holds a denoising loop's result: final latents x0 [B, C, H, W], and K recorded steps of each sample.

    `before` [B, K, C, H, W] holds the latents before those steps. If the kind of step has a density, `after` holds
    those after them and `log_probs` [B, K] their log-density; `means` holds the density's mean if it was requested.
    """

    x0: torch.Tensor
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    means: torch.Tensor | None = None

    @property
    def finite(self) -> torch.Tensor:
        """Tell as bool [B] which samples have no NaN and no infinity in their latents and means. Steps without noise
        have no log-density, which is no fault."""
        held = [kept for name, kept in self._held().items() if name != "log_probs"]
        return torch.stack([torch.isfinite(kept).flatten(1).all(1) for kept in held]).all(0)

    def only(self, rows: torch.Tensor) -> "Path":
        """Return the path with zeros in place of the samples that bool [B] `rows` leaves out."""
        held = {name: kept.new_zeros(()).where(~_like(rows, kept), kept) for name, kept in self._held().items()}
        return replace(self, **held)

    def _held(self) -> dict[str, torch.Tensor]:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: kept for name, kept in parts.items() if kept is not None}


def _like(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return rows.view(-1, *[1] * (x.ndim - 1))


def initial_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
    """Draw one standard normal tensor a generator, on the CPU, so that it depends on neither device nor batch."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def starting_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Return the noise with which rollouts of these seeds begin, on the CPU.

    It never travels, because any worker can make it again from the seeds.
    """
    return initial_noise([stream(seed) for seed in seeds], shape)


def path_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return the random streams of the steps' noises.

    They differ from the streams of the initial noises, which may be shared or have the same seeds.
    """
    return [stream(seed ^ 1) for seed in seeds]


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

    noises    seeds of the initial noises (default: `seeds`)
    noisy     steps that draw noise (default: all, if the kind of step has a density)
    indices   [B, K], steps to record, which may differ between samples
    policy    the network under the condition that is trained, if the samples are drawn under another one; log-densities
              and means are then the policy's
    means     whether to record the means of the densities
    steer     changes outputs and chooses rows; only for rollouts that record nothing. Copies of a row take turns on its
              stream of noise, so they differ from the next noisy step on
    """
    generators = path_generators(seeds)
    x = starting_noise(noises if noises is not None else seeds, shape).to(device)
    record = Recorder(indices, x, step.has_density, means) if indices is not None and indices.size else None
    for k in range(len(step.sigmas) - 1):
        if steer and (rows := steer.select(k, x)) is not None:
            x, generators = x[rows], [generators[row] for row in rows]
        steps = torch.full((len(x),), k, device=device)
        level = step.fed(steps)
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
        """Store step k for the samples that record it."""
        rows, slots = (torch.from_numpy(places).to(x.device) for places in np.nonzero(self.indices == k))
        for kept, values in (
            (self.before, x),
            (self.after, x_next),
            (self.log_probs, log_prob),
            (self.means, mean),
        ):
            if kept is not None:
                kept[rows, slots] = values[rows]
