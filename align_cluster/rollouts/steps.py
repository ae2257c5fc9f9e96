"""Sampler steps: pure fp32 maths from (x, velocity, sigma, sigma_next) to the next latent, and its density where it
has one.

Flow convention: x_t = (1 - sigma) x0 + sigma eps, v = eps - x0; dt = sigma_next - sigma < 0.
ADD A STEP HERE: a class with Config, `has_density`, `advance` and, with a density, `log_prob`; and a line in STEPS.
"""

import math
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from align_cluster.config.base import Section


def euler_step(x: torch.Tensor, v: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """x + v dt."""
    return x + v * (sigma_next - sigma)


def dpm2_step(
    x: torch.Tensor, x0: torch.Tensor, x0_before: torch.Tensor, before: float, sigma: float, sigma_next: float
) -> torch.Tensor:
    """DPM-Solver++(2M) in data prediction (Lu et al. 2022, arXiv 2211.01095, alg. 2) for alpha = 1 - sigma.

    x0 and x0_before are the predictions at `sigma` and at the level `before` it. For before = 1, whose half log-SNR is
    minus infinity, the second-order term vanishes and the step is Euler's.
    """

    def log_snr(level: float) -> float:
        return math.log1p(-level) - math.log(level)

    h = log_snr(sigma_next) - log_snr(sigma)
    gain = (1 - sigma_next) * math.expm1(-h)
    step = (sigma_next / sigma) * x - gain * x0
    if before < 1:
        r = (log_snr(sigma) - log_snr(before)) / h
        step = step - 0.5 * gain * (x0 - x0_before) / r
    return step


def flow_sde_mean(
    x: torch.Tensor, v: torch.Tensor, sigma: float, sigma_next: float, sigma_max: float, noise_level: float
) -> tuple[torch.Tensor, float, float]:
    """Mean, standard deviation and std_t of a Flow-GRPO SDE step (Liu et al. 2025, arXiv 2505.05470, eq. 9).

    sigma_max = sigmas[1] replaces sigma in the denominator at sigma = 1, as in the official code.
    """
    dt = sigma_next - sigma
    std_t = noise_level * math.sqrt(sigma / (1 - (sigma if sigma < 1 else sigma_max)))
    mean = x * (1 + std_t**2 / (2 * sigma) * dt) + v * (1 + std_t**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std_t * math.sqrt(-dt), std_t


def gaussian_log_prob(x: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """Log-density of x [B, ...] averaged over all non-batch dimensions, [B] (Flow-GRPO's convention: a mean, not a
    sum)."""
    density = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


class Euler:
    """Plain ODE steps."""

    class Config(Section):
        kind: Literal["euler"] = "euler"

    has_density = False

    def __init__(self, config: "Euler.Config", sigmas: np.ndarray) -> None:
        self.sigmas = sigmas

    def advance(self, k: int, x: torch.Tensor, v: torch.Tensor, noise: None = None) -> torch.Tensor:
        return euler_step(x, v, float(self.sigmas[k]), float(self.sigmas[k + 1]))


class Dpm2:
    """DPM-Solver++(2M), the ODE solver of DiffusionNFT's rollouts; first and last step are Euler's."""

    class Config(Section):
        kind: Literal["dpm2"] = "dpm2"

    has_density = False

    def __init__(self, config: "Dpm2.Config", sigmas: np.ndarray) -> None:
        self.sigmas = sigmas
        self.x0_before: torch.Tensor | None = None

    def advance(self, k: int, x: torch.Tensor, v: torch.Tensor, noise: None = None) -> torch.Tensor:
        sigma, sigma_next = float(self.sigmas[k]), float(self.sigmas[k + 1])
        x0, x0_before = x - sigma * v, self.x0_before
        self.x0_before = x0
        if k == 0 or sigma_next == 0:
            return euler_step(x, v, sigma, sigma_next)
        return dpm2_step(x, x0, x0_before, float(self.sigmas[k - 1]), sigma, sigma_next)


class FlowSde:
    """Flow-GRPO's SDE: the ODE's marginals with noise injected at every step, so that each step has a Gaussian
    density."""

    class Config(Section):
        kind: Literal["flow_sde"] = "flow_sde"
        noise_level: Annotated[float, Field(gt=0)] = 0.7

    has_density = True

    def __init__(self, config: "FlowSde.Config", sigmas: np.ndarray) -> None:
        self.noise_level, self.sigmas = config.noise_level, sigmas

    def mean(self, k: int, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        """(mean, standard deviation, std_t) of the step that starts at noise level k."""
        sigma, sigma_next, sigma_max = (float(self.sigmas[i]) for i in (k, k + 1, 1))
        return flow_sde_mean(x, v, sigma, sigma_next, sigma_max, self.noise_level)

    def advance(self, k: int, x: torch.Tensor, v: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean, std, _ = self.mean(k, x, v)
        return mean + std * noise

    def log_prob(self, k: int, x: torch.Tensor, v: torch.Tensor, x_next: torch.Tensor) -> torch.Tensor:
        """Log-density [B] of x_next; gradient flows through v only."""
        mean, std, _ = self.mean(k, x, v)
        return gaussian_log_prob(x_next, mean, std)


STEPS = {"euler": Euler, "dpm2": Dpm2, "flow_sde": FlowSde}
