"""Sampler steps: how one denoising step turns a latent and the network's output into the next, and its density.

Every single-step kind is linear: x_next = a x + b output + std z. A kind is therefore a pure function from the noise
levels sigma [N + 1] (fp64, falling) to tables of a, b and std, one entry a step.

Flow models: x_t = (1 - sigma) x0 + sigma eps, v = eps - x0, so x0_hat = x - sigma v and eps_hat = x + (1 - sigma) v.
Epsilon and v models: x_t = sqrt(1 - sigma^2) x0 + sigma eps, so alpha_bar = 1 - sigma^2.

ADD A STEP HERE: a coefficients function; a class with Config and `coefficients`; and a line in STEPS.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat

from align_cluster.settings import Section


@dataclass(frozen=True)
class Coefficients:
    """Tables fp64 [N]: step k draws from N(x[k] x + output[k] output, std[k]^2).

    `std_t` is the noise per unit of time, std / sqrt(-dt), where the kind is a discretised SDE; elsewhere it is `std`.
    """

    x: np.ndarray
    output: np.ndarray
    std: np.ndarray
    std_t: np.ndarray


def euler_coefficients(sigmas: np.ndarray) -> Coefficients:
    """x + v dt."""
    dt = np.diff(sigmas)
    return Coefficients(np.ones_like(dt), dt, np.zeros_like(dt), np.zeros_like(dt))


def _langevin_coefficients(sigmas: np.ndarray, std_t: np.ndarray) -> Coefficients:
    """x + v dt + std_t^2 / 2 score (-dt) with score = -eps_hat / sigma."""
    sigma, dt = sigmas[:-1], np.diff(sigmas)
    drift = std_t**2 / (2 * sigma) * dt
    return Coefficients(1 + drift, dt + drift * (1 - sigma), std_t * np.sqrt(-dt), std_t)


def flow_sde_coefficients(sigmas: np.ndarray, noise_level: float) -> Coefficients:
    """Flow-GRPO's SDE step (Liu et al. 2025, arXiv 2505.05470, eq. 9): std_t = noise_level sqrt(sigma / (1 - sigma)).

    sigmas[1] replaces sigma in the denominator at sigma = 1, as in the official code.
    """
    sigma = sigmas[:-1]
    return _langevin_coefficients(sigmas, noise_level * np.sqrt(sigma / (1 - np.where(sigma < 1, sigma, sigmas[1]))))


def dance_sde_coefficients(sigmas: np.ndarray, eta: float) -> Coefficients:
    """DanceGRPO's SDE step (Xue et al. 2025, arXiv 2505.07818): std_t = eta at every level."""
    return _langevin_coefficients(sigmas, np.full(len(sigmas) - 1, eta))


def _flow_coefficients(sigmas: np.ndarray, x0: np.ndarray, eps: np.ndarray, std: np.ndarray) -> Coefficients:
    """x0 x0_hat + eps eps_hat."""
    sigma = sigmas[:-1]
    return Coefficients(x0 + eps, eps * (1 - sigma) - x0 * sigma, std, std)


def cps_coefficients(sigmas: np.ndarray, noise_level: float) -> Coefficients:
    """Flow-CPS step (arXiv 2509.05952): new noise takes the place of old, so that their total is sigma_next.

    std = sigma_next sin(noise_level pi / 2), and eps_hat keeps sqrt(sigma_next^2 - std^2). No noise in the last step.
    """
    after, angle = sigmas[1:], noise_level * math.pi / 2
    return _flow_coefficients(sigmas, 1 - after, after * math.cos(angle), after * math.sin(angle))


def flow_ddim_coefficients(sigmas: np.ndarray, eta: float) -> Coefficients:
    """DDIM for flow models, as in DiffusionNFT's solver: std = eta sigma_next q, where q^2 is one minus the squared
    ratio of the signal-to-noise ratios before and after.

    q is 1 at sigma = 1, where nothing of x is signal. No noise in the last step.
    """
    before, after = sigmas[:-1], sigmas[1:]
    std = eta * after * np.sqrt(1 - (after * (1 - before) / (before * (1 - after))) ** 2)
    return _flow_coefficients(sigmas, 1 - after, np.sqrt(after**2 - std**2), std)


def ddim_coefficients(levels: np.ndarray, eta: float, prediction: str) -> Coefficients:
    """DDIM (Song et al. 2020, arXiv 2010.02502, eqs. 12 and 16) for prediction "epsilon" or "v"; eta 1 is DDPM's noise.

    ValueError where an epsilon model is asked for x0 at level 1, which has no signal.
    """
    before, after = levels[:-1], levels[1:]
    kept, kept_after = np.sqrt(1 - before**2), np.sqrt(1 - after**2)  # sqrt(alpha_bar)
    std = eta * after / before * np.sqrt(1 - (kept / kept_after) ** 2)
    eps = np.sqrt(np.maximum(after**2 - std**2, 0))
    if prediction == "v":  # x0_hat = kept x - sigma v, eps_hat = sigma x + kept v
        return Coefficients(kept_after * kept + eps * before, eps * kept - kept_after * before, std, std)
    if not kept.all():
        raise ValueError("a model that predicts epsilon has no x0 at noise level 1")
    return Coefficients(kept_after / kept, eps - kept_after / kept * before, std, std)


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


def gaussian_log_prob(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Log-density of x [B, ...] averaged over all non-batch dimensions, [B] (Flow-GRPO's convention: a mean, not a
    sum); std [B]."""
    std = _like(std, x)
    density = -((x - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def _like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """values [B] in a shape that broadcasts over x [B, ...]."""
    return values.view(-1, *[1] * (x.ndim - 1))


class _Tables:
    """Coefficients as one fp32 tensor [4, N], gathered by step index on the device of the latents."""

    def __init__(self, coefficients: Coefficients) -> None:
        rows = (coefficients.x, coefficients.output, coefficients.std, coefficients.std_t)
        self.rows = torch.from_numpy(np.stack(rows)).float()

    def at(self, k: torch.Tensor, device: torch.device) -> torch.Tensor:
        """[4, B] for k [B]."""
        self.rows = self.rows.to(device)
        return self.rows[:, k.to(device)]


class Step:
    """A kind of step at given noise levels; without `coefficients` of its own it is the ODE's: Euler's for velocities,
    DDIM's for epsilon and v.

    `predictions` are what a network may predict for it. `terminal_noise` False: the last step of a rollout is drawn
    without noise. `normalised` says whether a density is a normalised Gaussian, `noise_vanishes` whether its noise goes
    to 0 with the noise level, and `multistep` whether a step depends on the one before it.
    """

    Config: type[Section]
    has_density: ClassVar[bool] = False
    predictions: ClassVar[tuple[str, ...]] = ("flow",)
    terminal_noise: ClassVar[bool] = True
    normalised: ClassVar[bool] = True
    noise_vanishes: ClassVar[bool] = False
    multistep: ClassVar[bool] = False

    def __init__(self, config: Section, sigmas: np.ndarray, prediction: str = "flow") -> None:
        if prediction not in self.predictions:
            raise ValueError(f"step {config.kind} is for networks that predict {self.predictions}, not {prediction}")
        self.config, self.sigmas, self.prediction = config, sigmas, prediction
        self._ode = _Tables(self.deterministic())

    def deterministic(self) -> Coefficients:
        """The same kind of step without noise."""
        flow = self.prediction == "flow"
        return euler_coefficients(self.sigmas) if flow else ddim_coefficients(self.sigmas, 0.0, self.prediction)

    def is_noisy(self, k: int) -> bool:
        """Whether a rollout draws noise in step k."""
        return self.has_density and (self.terminal_noise or k < len(self.sigmas) - 2)

    def level(self, k: torch.Tensor) -> torch.Tensor:
        """Noise level fp32 [B] that the network is fed at the steps k, int64 [B]."""
        return torch.tensor(self.sigmas, dtype=torch.float32, device=k.device)[k]  # records may be read-only

    def advance(self, k: int, x: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """The next latent, like x [B, ...], after step k of all samples; noise None: the deterministic step."""
        a, b, _, _ = self._ode.at(torch.full((len(x),), k, device=x.device), x.device)
        return x * _like(a, x) + output * _like(b, x)


class NoisyStep(Step, ABC):
    """A step with a density. Rollout and learner take the same fp32 coefficients, so they compute the same bits."""

    has_density = True

    def __init__(self, config: Section, sigmas: np.ndarray, prediction: str = "flow") -> None:
        super().__init__(config, sigmas, prediction)
        self._sde = _Tables(self.coefficients())

    @abstractmethod
    def coefficients(self) -> Coefficients:
        """The step with noise. A std of 0 (the last step of some kinds) means no density there: it is not trained."""

    def mean(
        self, k: torch.Tensor, x: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(mean like x [B, ...], std [B], std_t [B]) at the steps k, int64 [B], which may differ between samples."""
        a, b, std, std_t = self._sde.at(k, x.device)
        return x * _like(a, x) + output * _like(b, x), std, std_t

    def advance(self, k: int, x: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        if noise is None:
            return super().advance(k, x, output)
        mean, std, _ = self.mean(torch.full((len(x),), k, device=x.device), x, output)
        return mean + _like(std, x) * noise

    def density(self, mean: torch.Tensor, std: torch.Tensor, x_next: torch.Tensor) -> torch.Tensor:
        """What `log_prob` is made of, [B]: the Gaussian log-density, averaged over dimensions."""
        return gaussian_log_prob(x_next, mean, std)

    def log_prob(self, k: torch.Tensor, x: torch.Tensor, output: torch.Tensor, x_next: torch.Tensor) -> torch.Tensor:
        """Log-density [B] of x_next at the steps k [B]; gradient flows through the output only."""
        mean, std, _ = self.mean(k, x, output)
        return self.density(mean, std, x_next)


class Euler(Step):
    """Plain ODE steps: for networks that predict epsilon or v those of DDIM, which are Euler's in other coordinates."""

    class Config(Section):
        kind: Literal["euler"] = "euler"

    predictions = ("flow", "epsilon", "v")


class Dpm2(Step):
    """DPM-Solver++(2M), the ODE solver of DiffusionNFT's rollouts; first and last step are Euler's."""

    class Config(Section):
        kind: Literal["dpm2"] = "dpm2"

    multistep = True

    def __init__(self, config: "Dpm2.Config", sigmas: np.ndarray, prediction: str = "flow") -> None:
        super().__init__(config, sigmas, prediction)
        self.x0_before: torch.Tensor | None = None

    def advance(self, k: int, x: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        sigma, sigma_next = float(self.sigmas[k]), float(self.sigmas[k + 1])
        x0, x0_before = x - sigma * output, self.x0_before
        self.x0_before = x0
        if k == 0 or sigma_next == 0:
            return super().advance(k, x, output)
        return dpm2_step(x, x0, x0_before, float(self.sigmas[k - 1]), sigma, sigma_next)


class FlowSde(NoisyStep):
    """Flow-GRPO's SDE: the ODE's marginals with noise injected at every step."""

    class Config(Section):
        kind: Literal["flow_sde"] = "flow_sde"
        noise_level: PositiveFloat = 0.7

    def coefficients(self) -> Coefficients:
        return flow_sde_coefficients(self.sigmas, self.config.noise_level)


class DanceSde(NoisyStep):
    """DanceGRPO's SDE, whose noise does not depend on the level.

    The last step has no noise, for the reward is to see its x0_hat. `truncate_timesteps` feeds the network with
    int(1000 sigma) / 1000, as the official code does.
    """

    class Config(Section):
        kind: Literal["dance_sde"] = "dance_sde"
        eta: PositiveFloat = 0.3
        truncate_timesteps: bool = False

    terminal_noise = False

    def coefficients(self) -> Coefficients:
        return dance_sde_coefficients(self.sigmas, self.config.eta)

    def level(self, k: torch.Tensor) -> torch.Tensor:
        sigma = super().level(k)
        # In fp32, like the official code: in fp64 a level such as 0.9 may fall just short of its integer.
        return torch.trunc(1000 * sigma) / 1000 if self.config.truncate_timesteps else sigma


class Cps(NoisyStep):
    """Flow-CPS: cleaner images than an SDE's, at the price of the ODE's marginals, which it contracts.

    Its density has no 1 / (2 std^2) and no constants, so log-ratios scale with std^2: clip ranges are about 1e-5.
    """

    class Config(Section):
        kind: Literal["cps"] = "cps"
        noise_level: Annotated[float, Field(gt=0, le=1)] = 0.8

    normalised = False

    def coefficients(self) -> Coefficients:
        return cps_coefficients(self.sigmas, self.config.noise_level)

    def density(self, mean: torch.Tensor, std: torch.Tensor, x_next: torch.Tensor) -> torch.Tensor:
        return -((x_next - mean) ** 2).flatten(1).mean(1)


class FlowDdim(NoisyStep):
    """DDIM with noise for flow models."""

    class Config(Section):
        kind: Literal["flow_ddim"] = "flow_ddim"
        eta: Annotated[float, Field(gt=0, le=1)] = 0.7

    noise_vanishes = True

    def coefficients(self) -> Coefficients:
        return flow_ddim_coefficients(self.sigmas, self.config.eta)


class Ddim(NoisyStep):
    """DDIM with noise for UNets that predict epsilon or v."""

    class Config(Section):
        kind: Literal["ddim"] = "ddim"
        eta: Annotated[float, Field(gt=0, le=1)] = 1.0

    predictions = ("epsilon", "v")

    def coefficients(self) -> Coefficients:
        return ddim_coefficients(self.sigmas, self.config.eta, self.prediction)


STEPS = {
    "euler": Euler,
    "dpm2": Dpm2,
    "flow_sde": FlowSde,
    "dance_sde": DanceSde,
    "cps": Cps,
    "flow_ddim": FlowDdim,
    "ddim": Ddim,
}
