"""The denoising loop: one batched chunk from noise to final latents, recording only what was asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [B, C, H, W], sigma [B]) -> v like x


@dataclass(frozen=True)
class Path:
    """Final latents [B, C, H, W] and, for the K recorded steps, where they began, what they drew, and its
    log-density."""

    x0: torch.Tensor
    before: torch.Tensor | None
    after: torch.Tensor | None
    log_probs: torch.Tensor | None


def initial_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
    """One standard normal tensor a generator, drawn on the CPU so that it does not depend on device or batch."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.no_grad()
def denoise(
    velocity: Velocity,
    step: object,
    sigmas: np.ndarray,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    indices: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> Path:
    """Draw len(seeds) samples with a step of `rollouts.steps`; steps in `indices` (which need a density) are recorded.

    All randomness of a sample comes from its own seed: first its initial noise, then its noise of each stochastic step.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = initial_noise(generators, shape).to(device)
    before, after, log_probs = [], [], []
    for k in range(len(sigmas) - 1):
        v = velocity(x, torch.full((len(seeds),), float(sigmas[k]), dtype=torch.float32, device=device))
        noise = initial_noise(generators, shape).to(device) if step.has_density else None
        x_next = step.advance(k, x, v, noise)
        if k in indices:
            before.append(x)
            after.append(x_next)
            log_probs.append(step.log_prob(k, x, v, x_next))
        x = x_next
    if not indices:
        return Path(x, None, None, None)
    return Path(x, torch.stack(before, 1), torch.stack(after, 1), torch.stack(log_probs, 1))
