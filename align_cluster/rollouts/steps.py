"""Sampler steps: how one denoising step turns a latent and the network's output into the next, and its density.

Every single-step kind is linear: x_next = a x + b output + std z. A kind is therefore a pure function from the noise
levels sigma [N + 1] (fp64, falling) to tables of a, b and std, one entry a step.

Flow models: x_t = (1 - sigma) x0 + sigma eps, v = eps - x0, so x0_hat = x - sigma v and eps_hat = x + (1 - sigma) v.
Epsilon and v models: x_t = sqrt(1 - sigma^2) x0 + sigma eps, so alpha_bar = 1 - sigma^2.

ADD A STEP HERE: write a coefficients function and a class with Config and `coefficients`, and add a line to STEPS.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat

from align_cluster.settings import Root, Section


@dataclass(frozen=True)
class Coefficients:
    """Holds tables fp64 [N]: step k draws from N(x[k] x + output[k] output, std[k]^2).

    `std_t` is the noise per unit of time, std / sqrt(-dt), for a discretised SDE; for other kinds it equals `std`.
    """

    x: np.ndarray
    output: np.ndarray
    std: np.ndarray
    std_t: np.ndarray


def euler_coefficients(sigmas: np.ndarray) -> Coefficients:
    """Return the tables of Euler's step, x + v dt."""
    dt = np.diff(sigmas)
    return Coefficients(np.ones_like(dt), dt, np.zeros_like(dt), np.zeros_like(dt))


def _langevin_coefficients(sigmas: np.ndarray, std_t: np.ndarray) -> Coefficients:
    """Return the tables of x + v dt + std_t^2 / 2 score (-dt), where the score is -eps_hat / sigma."""
    sigma, dt = sigmas[:-1], np.diff(sigmas)
    drift = std_t**2 / (2 * sigma) * dt
    return Coefficients(1 + drift, dt + drift * (1 - sigma), std_t * np.sqrt(-dt), std_t)


def flow_sde_coefficients(sigmas: np.ndarray, noise_level: float) -> Coefficients:
    """Return Flow-GRPO's SDE step (Liu et al. 2025, arXiv 2505.05470, eq. 9).

    std_t = noise_level sqrt(sigma / (1 - sigma)). At sigma = 1, sigmas[1] replaces sigma in the denominator, as in the
    official code.
    """
    sigma = sigmas[:-1]
    return _langevin_coefficients(sigmas, noise_level * np.sqrt(sigma / (1 - np.where(sigma < 1, sigma, sigmas[1]))))


def dance_sde_coefficients(sigmas: np.ndarray, eta: float) -> Coefficients:
    """Return DanceGRPO's SDE step (Xue et al. 2025, arXiv 2505.07818): std_t = eta at every level."""
    return _langevin_coefficients(sigmas, np.full(len(sigmas) - 1, eta))


def _flow_coefficients(sigmas: np.ndarray, x0: np.ndarray, eps: np.ndarray, std: np.ndarray) -> Coefficients:
    """Return the tables of a flow step given by the weights of x0_hat and eps_hat."""
    sigma = sigmas[:-1]
    return Coefficients(x0 + eps, eps * (1 - sigma) - x0 * sigma, std, std)


def cps_coefficients(sigmas: np.ndarray, noise_level: float) -> Coefficients:
    """Return the Flow-CPS step (arXiv 2509.05952): new noise replaces old noise, so their total is sigma_next.

    std = sigma_next sin(noise_level pi / 2), and eps_hat keeps sqrt(sigma_next^2 - std^2). The last step has no noise.
    """
    after, angle = sigmas[1:], noise_level * math.pi / 2
    return _flow_coefficients(sigmas, 1 - after, after * math.cos(angle), after * math.sin(angle))


def flow_ddim_coefficients(sigmas: np.ndarray, eta: float) -> Coefficients:
    """Return DDIM for flow models, as in DiffusionNFT's solver: std = eta sigma_next q.

    q^2 is one minus the squared ratio of the signal-to-noise ratios before and after the step. q is 1 at sigma = 1,
    where x holds no signal. The last step has no noise.
    """
    before, after = sigmas[:-1], sigmas[1:]
    std = eta * after * np.sqrt(1 - (after * (1 - before) / (before * (1 - after))) ** 2)
    return _flow_coefficients(sigmas, 1 - after, np.sqrt(after**2 - std**2), std)


def ddim_coefficients(levels: np.ndarray, eta: float, prediction: str) -> Coefficients:
    """Return DDIM (Song et al. 2020, arXiv 2010.02502, eqs. 12 and 16) for prediction "epsilon" or "v".

    eta 1 is DDPM's noise. Raises ValueError if an epsilon model is asked for x0 at level 1, which has no signal.
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
    """Return the next latent of DPM-Solver++(2M) in data prediction for alpha = 1 - sigma.

    Source: Lu et al. 2022, arXiv 2211.01095, algorithm 2. x0 and x0_before are the predictions at `sigma` and at the
    level `before` it. For before = 1 the half log-SNR is minus infinity, the second-order term vanishes, and the step
    is Euler's.
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
    """Return the log-density [B] of x [B, ...] under N(mean, std [B]), averaged over all non-batch dimensions.

    Flow-GRPO's convention is this mean, and not the sum.
    """
    std = _like(std, x)
    density = -((x - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def _like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return values [B] in a shape that broadcasts over x [B, ...]."""
    return values.view(-1, *[1] * (x.ndim - 1))


class _Tables:
    """Holds coefficients as one fp32 tensor [4, N] on the device of the latents."""

    def __init__(self, coefficients: Coefficients) -> None:
        rows = (coefficients.x, coefficients.output, coefficients.std, coefficients.std_t)
        self.rows = torch.from_numpy(np.stack(rows)).float()

    def at(self, k: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the coefficients [4, B] of steps k [B]."""
        self.rows = self.rows.to(device)
        return self.rows[:, k.to(device)]


def whole_thousandths(level: torch.Tensor) -> torch.Tensor:
    """Return noise levels cut to int(1000 sigma) / 1000, as the code of DanceGRPO and SRPO feeds them to FLUX."""
    # fp32, like the official code: in fp64 1000 sigma may fall just short of an integer, and lose it.
    return torch.trunc(1000 * level.float()) / 1000


class FedLevels(Section):
    """Says which noise levels a step feeds to the network."""

    truncate_timesteps: bool = False
    """Whether the network is fed with noise levels cut to thousandths, int(1000 sigma) / 1000, in rollouts and in
    updates that repeat their steps. The official code of DanceGRPO and SRPO does so. The steps themselves, and
    evaluation, take exact levels."""

    def problems(self, where: str, run: Root) -> Iterator[str]:
        """Refuse to cut the timesteps of networks whose timesteps are whole."""
        if self.truncate_timesteps and run.prediction != "flow":
            yield (
                f"{where}.truncate_timesteps cuts the noise levels that a flow network is fed, and backbone.kind "
                f"{run.backbone.kind} takes whole timesteps; leave it out"
            )


class Step:
    """Takes denoising steps at given noise levels. Without `coefficients` of its own it is an ODE step.

    The ODE step is Euler's for velocities and DDIM's for epsilon and v. `predictions` are the network predictions that
    the kind supports. With `terminal_noise = False`, the last step of a rollout draws no noise.

    `normalised` says whether a density is a normalised Gaussian, `noise_vanishes` whether its noise goes to 0 with the
    noise level, and `multistep` whether a step depends on the one before it.
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
        """Return the tables of the same step without noise."""
        flow = self.prediction == "flow"
        return euler_coefficients(self.sigmas) if flow else ddim_coefficients(self.sigmas, 0.0, self.prediction)

    def is_noisy(self, k: int) -> bool:
        """Return whether a rollout draws noise in step k."""
        return self.has_density and (self.terminal_noise or k < len(self.sigmas) - 2)

    def level(self, k: torch.Tensor) -> torch.Tensor:
        """Return the noise levels fp32 [B] at which the steps k, int64 [B], begin."""
        # torch.tensor copies: sigmas of a record may lie in read-only shared memory.
        return torch.tensor(self.sigmas, dtype=torch.float32, device=k.device)[k]

    def fed(self, k: torch.Tensor) -> torch.Tensor:
        """Return the noise levels fp32 [B] that the network is fed at the steps k, int64 [B]."""
        cut = isinstance(self.config, FedLevels) and self.config.truncate_timesteps
        return whole_thousandths(self.level(k)) if cut else self.level(k)

    def advance(self, k: int, x: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return the next latent, like x [B, ...], after step k of all samples; without `noise` it is deterministic."""
        a, b, _, _ = self._ode.at(torch.full((len(x),), k, device=x.device), x.device)
        return x * _like(a, x) + output * _like(b, x)


class NoisyStep(Step, ABC):
    """Takes steps with a density. Rollout and learner use the same fp32 coefficients, hence the same bits."""

    has_density = True

    def __init__(self, config: Section, sigmas: np.ndarray, prediction: str = "flow") -> None:
        super().__init__(config, sigmas, prediction)
        self._sde = _Tables(self.coefficients())

    @abstractmethod
    def coefficients(self) -> Coefficients:
        """Return the tables of the step with noise.

        Some kinds have a std of 0 in the last step. It then has no density and is not trained.
        """

    def mean(
        self, k: torch.Tensor, x: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (mean like x [B, ...], std [B], std_t [B]) at the steps k, int64 [B]; samples may differ in k."""
        a, b, std, std_t = self._sde.at(k, x.device)
        return x * _like(a, x) + output * _like(b, x), std, std_t

    def advance(self, k: int, x: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return the step's mean plus std times the noise; without noise, return the deterministic step."""
        if noise is None:
            return super().advance(k, x, output)
        mean, std, _ = self.mean(torch.full((len(x),), k, device=x.device), x, output)
        return mean + _like(std, x) * noise

    def density(self, mean: torch.Tensor, std: torch.Tensor, x_next: torch.Tensor) -> torch.Tensor:
        """Return the Gaussian log-density [B] of x_next, averaged over dimensions."""
        return gaussian_log_prob(x_next, mean, std)

    def log_prob(self, k: torch.Tensor, x: torch.Tensor, output: torch.Tensor, x_next: torch.Tensor) -> torch.Tensor:
        """Return the log-density [B] of x_next at the steps k [B]; gradient flows through the output only."""
        mean, std, _ = self.mean(k, x, output)
        return self.density(mean, std, x_next)


class Euler(Step):
    """Takes plain ODE steps. For networks that predict epsilon or v they are DDIM's: Euler's in other coordinates."""

    class Config(FedLevels):
        """Configures Euler's step."""

        kind: Literal["euler"] = "euler"

    predictions = ("flow", "epsilon", "v")


class Dpm2(Step):
    """Takes steps of DPM-Solver++(2M), as DiffusionNFT's rollouts do. The first and the last step are Euler's."""

    class Config(Section):
        """DPM-Solver++(2M) has no settings."""

        kind: Literal["dpm2"] = "dpm2"

    multistep = True

    def __init__(self, config: "Dpm2.Config", sigmas: np.ndarray, prediction: str = "flow") -> None:
        super().__init__(config, sigmas, prediction)
        self.x0_before: torch.Tensor | None = None

    def advance(self, k: int, x: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Use the x0 prediction of the step before, which this object keeps; so steps must come in order."""
        sigma, sigma_next = float(self.sigmas[k]), float(self.sigmas[k + 1])
        x0, x0_before = x - sigma * output, self.x0_before
        self.x0_before = x0
        if k == 0 or sigma_next == 0:
            return super().advance(k, x, output)
        return dpm2_step(x, x0, x0_before, float(self.sigmas[k - 1]), sigma, sigma_next)


class FlowSde(NoisyStep):
    """Takes Flow-GRPO's SDE steps, which keep the ODE's marginals and inject noise at every step."""

    class Config(Section):
        """Configures Flow-GRPO's SDE."""

        kind: Literal["flow_sde"] = "flow_sde"
        noise_level: PositiveFloat = 0.7
        """The factor of the noise, which is noise_level sqrt(sigma / (1 - sigma)) per root of time. More noise explores
        more and makes worse images. Flow-GRPO uses 0.7 for SD3.5 Medium, 0.9 for FLUX and 1.2 for Qwen-Image."""

    def coefficients(self) -> Coefficients:
        """Return `flow_sde_coefficients`."""
        return flow_sde_coefficients(self.sigmas, self.config.noise_level)


class DanceSde(NoisyStep):
    """Takes DanceGRPO's SDE steps, with the same noise per unit of time at every level.

    The last step has no noise, so that the reward sees its x0_hat.
    """

    class Config(FedLevels):
        """Configures DanceGRPO's SDE."""

        kind: Literal["dance_sde"] = "dance_sde"
        eta: PositiveFloat = 0.3
        """The noise per root of time, equal at all levels. DanceGRPO uses 0.3 for FLUX."""

    terminal_noise = False

    def coefficients(self) -> Coefficients:
        """Return `dance_sde_coefficients`."""
        return dance_sde_coefficients(self.sigmas, self.config.eta)


class Cps(NoisyStep):
    """Takes Flow-CPS steps: images are cleaner than an SDE's, but the ODE's marginals contract.

    Its density has neither 1 / (2 std^2) nor constants, so log-ratios scale with std^2 and clip ranges are about 1e-5.
    """

    class Config(Section):
        """Configures Flow-CPS."""

        kind: Literal["cps"] = "cps"
        noise_level: Annotated[float, Field(gt=0, le=1)] = 0.8
        """The angle of the new noise as a share of pi / 2: 0 would draw none, and 1 replaces all noise that is left.
        Flow-GRPO's code uses 0.8."""

    normalised = False

    def coefficients(self) -> Coefficients:
        """Return `cps_coefficients`."""
        return cps_coefficients(self.sigmas, self.config.noise_level)

    def density(self, mean: torch.Tensor, std: torch.Tensor, x_next: torch.Tensor) -> torch.Tensor:
        """Return minus the mean squared distance to the mean, [B]."""
        return -((x_next - mean) ** 2).flatten(1).mean(1)


class FlowDdim(NoisyStep):
    """Takes DDIM steps with noise, for flow models."""

    class Config(Section):
        """Configures DDIM for flow models."""

        kind: Literal["flow_ddim"] = "flow_ddim"
        eta: Annotated[float, Field(gt=0, le=1)] = 0.7
        """The factor of the noise; 1 is DDPM's."""

    noise_vanishes = True

    def coefficients(self) -> Coefficients:
        """Return `flow_ddim_coefficients`."""
        return flow_ddim_coefficients(self.sigmas, self.config.eta)


class Ddim(NoisyStep):
    """Takes DDIM steps with noise, for UNets that predict epsilon or v."""

    class Config(Section):
        """Configures DDIM."""

        kind: Literal["ddim"] = "ddim"
        eta: Annotated[float, Field(gt=0, le=1)] = 1.0
        """The factor of the noise; 1 is DDPM's. DanceGRPO uses 1 for SD1.4."""

    predictions = ("epsilon", "v")

    def coefficients(self) -> Coefficients:
        """Return `ddim_coefficients`."""
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
