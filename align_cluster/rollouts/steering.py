"""Steering with a critic while images are drawn, after "Explicit Critic Guidance" (arXiv 2605.27736): best of n,
sequential Monte Carlo, the critic's gradient, and gradient with best of n. The paper names the modes; the formulas are
reconstructed from the literature named below.

A critic says values [B, R] of noisy latents, one a reward, in units of the normalised rewards; `shares` [R] weigh them
to one value V. Rewards [n, R] are in the same units, NaN where a reward says nothing of an image.

ADD A MODE HERE: a class with Config and those of Steering's methods that it changes, and a line in STEERING.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Annotated, Literal, Union

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from align_cluster.errors import UserError
from align_cluster.rollouts.steps import STEPS, Dpm2, Step
from align_cluster.settings import Section

Values = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [B, C, H, W], sigma [B]) -> [B, R], differentiable
Fraction = Annotated[float, Field(ge=0, le=1)]
# dpm2 remembers the rows of the step before, which may be others by now.
SingleStep = Annotated[
    Union[tuple(kind.Config for kind in STEPS.values() if kind is not Dpm2)],  # noqa: UP007 - made of a dict
    Field(discriminator="kind"),
]
SIGNAL = 0.05  # least 1 - sigma that the ODE's guidance divides by
BATCH = 8  # latents that go through a network at once


def normalised(log_weights: np.ndarray) -> np.ndarray:
    """Weights [n] that sum to 1."""
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def effective_size(weights: np.ndarray) -> float:
    """How many equally weighted particles normalised weights [n] are worth: 1 / sum w^2, from 1 to n."""
    return float(1 / (weights**2).sum())


def systematic(weights: np.ndarray, offset: float) -> np.ndarray:
    """Ancestors int64 [n] of a systematic resampling (Kitagawa 1996): those under n equally spaced points, moved by
    `offset` in [0, 1). With a uniform offset i comes n w_i times on average, always rounded down or up."""
    points = (offset + np.arange(len(weights))) / len(weights)
    return np.searchsorted(np.cumsum(weights)[:-1], points, side="right")


def weighted(heads: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Weighted mean [n] of the heads [n, R] that are not NaN, by shares [R] of either sign; NaN where all are."""
    known = ~np.isnan(heads)
    total = (np.abs(shares) * known).sum(1)
    return np.divide(np.where(known, heads, 0.0) @ shares, total, out=np.full(len(heads), np.nan), where=total > 0)


def guidance_gains(step: Step) -> np.ndarray:
    """What a gradient of V is multiplied with before it is added to the network's output: fp64 [N].

    A step that draws noise of std s gets the mean mu + s^2 grad V: a Gaussian tilted by exp(V). One that draws none
    gets the score + grad V (Dhariwal & Nichol 2021, arXiv 2105.05233): v - sigma / (1 - sigma) grad V of a flow.
    """
    sigma = step.sigmas[:-1]
    signal = {"flow": 1 - sigma, "epsilon": np.ones_like(sigma), "v": np.sqrt(1 - sigma**2)}[step.prediction]
    gains = -sigma / np.maximum(signal, SIGNAL)
    if step.has_density:
        table, noisy = step.coefficients(), [step.is_noisy(k) for k in range(len(sigma))]
        gains = np.where(noisy, table.std**2 / table.output, gains)
    return gains


def clipped(gradient: torch.Tensor, output: torch.Tensor, share: float) -> torch.Tensor:
    """Gradients [B, ...], each no longer than `share` of the output beside it."""
    size, most = gradient.flatten(1).norm(dim=1), share * output.flatten(1).norm(dim=1)
    factor = (most / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1)
    return gradient * factor.view(-1, *[1] * (gradient.ndim - 1))


class Steering:
    """One rollout's `denoise.Steer`, and which of its rows are kept at the end. By itself it changes nothing.

    `needs_noise`: of no use with deterministic steps. `origin` says which seed each row began with, `heads` [B, R] what
    the critic last said of the rows. `forwards` and `backwards` count its passes, one a latent.
    """

    class Config(Section):
        """`step: null` takes the ODE's steps, as plain sampling does."""

        step: SingleStep | None = None

    needs_noise = False

    def __init__(self, config: Section, step: Step, values: Values, shares: np.ndarray, seeds: Sequence[int]) -> None:
        self.config, self.step, self.values, self.shares = config, step, values, shares
        self.origin, self.heads = np.arange(len(seeds)), np.full((len(seeds), len(shares)), np.nan)
        self.random = random.Random(seeds[0])
        self.forwards = self.backwards = 0

    @classmethod
    def problems(cls, config: Section, sigmas: np.ndarray, unjudged: str | None) -> Iterator[str]:
        """What cannot work at noise levels [N + 1], a sentence each; no reward judges images of prompt `unjudged`."""
        yield from ()

    def choose(self, rewards: np.ndarray) -> list[int]:
        """Final rows that are kept, by their rewards [n, R]."""
        return list(range(len(rewards)))

    def facts(self) -> dict[str, object]:
        """What a mode has to say of its way."""
        return {}

    def select(self, k: int, x: torch.Tensor) -> list[int] | None:
        return None

    def push(self, k: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output

    def appraise(self, k: int, x: torch.Tensor) -> np.ndarray:
        """V [B] of the rows that step k starts from."""
        with torch.no_grad():
            self.heads = torch.cat([self._heads(k, part) for part in x.split(BATCH)]).double().cpu().numpy()
        return self.heads @ self.shares

    def go_on_with(self, rows: np.ndarray) -> list[int]:
        self.origin, self.heads = self.origin[rows], self.heads[rows]
        return rows.tolist()

    def gradient(self, k: int, x: torch.Tensor) -> torch.Tensor:
        """Gradient of V, like x."""
        gradients, heads = [], []
        for part in x.split(BATCH):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                heads.append(self._heads(k, part))
                total = heads[-1] @ torch.tensor(self.shares, dtype=part.dtype, device=part.device)
                gradients += torch.autograd.grad(total.sum(), part)
        self.heads = torch.cat(heads).detach().double().cpu().numpy()
        self.backwards += len(x)
        return torch.cat(gradients)

    def _heads(self, k: int, x: torch.Tensor) -> torch.Tensor:
        self.forwards += len(x)
        return self.values(x, x.new_full((len(x),), float(self.step.sigmas[k])))


class BestOfN(Steering):
    """Keeps the image of highest reward, or what the critic found most promising on the way."""

    class Config(Steering.Config):
        """`n` images are begun for each one that is kept. With `prune_at` only the `keep` of highest value go on from
        that step; where that is one, no reward is asked."""

        kind: Literal["best_of_n"] = "best_of_n"
        n: PositiveInt = 8
        prune_at: NonNegativeInt | None = None
        keep: PositiveInt = 1

    @classmethod
    def problems(cls, config: Section, sigmas: np.ndarray, unjudged: str | None) -> Iterator[str]:
        yield from super().problems(config, sigmas, unjudged)
        last = len(sigmas) - 2
        if config.prune_at is None:
            if config.keep > 1:
                yield f"steer.keep is {config.keep}, and nothing is pruned; set steer.prune_at, or leave steer.keep out"
        elif config.prune_at > last or config.keep > config.n:
            yield (
                f"steer.prune_at is {config.prune_at} and steer.keep {config.keep}, with steps 0 to {last} and steer.n "
                f"{config.n}; set prune_at to one of the steps, and keep to {config.n} at most"
            )
        if unjudged is not None and (config.n if config.prune_at is None else config.keep) > 1:
            yield (
                f"{config.kind} keeps the image of highest reward, and no reward judges {unjudged!r}; leave --no-score "
                f"out and give prompts with metadata, or let the critic choose: --set steer.prune_at={last // 2 + 1}"
            )

    def select(self, k: int, x: torch.Tensor) -> list[int] | None:
        if k != self.config.prune_at:
            return None
        best = np.argsort(-self.appraise(k, x), kind="stable")[: self.config.keep]
        return self.go_on_with(np.sort(best))

    def choose(self, rewards: np.ndarray) -> list[int]:
        if len(rewards) == 1:
            return [0]
        totals = weighted(rewards, self.shares)
        if np.isnan(totals).all():
            raise UserError("no reward has a score by which to choose the best image; let the critic: steer.prune_at")
        return [int(np.nanargmax(totals))]


class Smc(Steering):
    """Sequential Monte Carlo (Del Moral et al. 2006): particles live on in proportion to exp(strength x the gain in
    value). The last value is the reward, so the weights' product is exp(strength (R - V_0))."""

    class Config(Steering.Config):
        """`n` particles are drawn for each image. They are resampled where their weights are worth less than the share
        `resample_below` of them. `pick: best` keeps the particle of highest reward, `sample` draws one by the weights.
        `step: null` takes the run's own kind of step, which must draw noise.
        """

        kind: Literal["smc"] = "smc"
        n: PositiveInt = 8
        strength: PositiveFloat = 1.0
        resample_below: Fraction = 0.5
        pick: Literal["best", "sample"] = "best"

    needs_noise = True

    def __init__(self, config: Section, step: Step, values: Values, shares: np.ndarray, seeds: Sequence[int]) -> None:
        super().__init__(config, step, values, shares, seeds)
        self.log_weights, self.before = np.zeros(len(seeds)), np.zeros(len(seeds))
        self.resampled: list[int] = []
        self.sizes: list[float] = []

    def select(self, k: int, x: torch.Tensor) -> list[int] | None:
        values = self.appraise(k, x)
        if k == 0:
            self.before = values
        weights = self._weigh(values)
        if effective_size(weights) >= self.config.resample_below * len(values):
            return None
        rows = systematic(weights, self.random.random())
        self.resampled.append(k)
        self.before, self.log_weights = values[rows], np.zeros(len(values))
        return self.go_on_with(rows)

    def choose(self, rewards: np.ndarray) -> list[int]:
        """Where a reward says nothing, the critic's last word stands."""
        final = np.where(np.isnan(rewards), self.heads, rewards) @ self.shares
        weights = self._weigh(final)
        if self.config.pick == "best":
            return [int(final.argmax())]
        return self.random.choices(range(len(final)), weights)

    def facts(self) -> dict[str, object]:
        return {"resampled": self.resampled, "effective_size": self.sizes}

    def _weigh(self, values: np.ndarray) -> np.ndarray:
        """Normalised weights [n] once the particles have these values."""
        self.log_weights = self.log_weights + self.config.strength * (values - self.before)
        self.before = values
        weights = normalised(self.log_weights)
        self.sizes.append(effective_size(weights))
        return weights


class Guidance(Steering):
    """Follows the critic's gradient."""

    class Config(Steering.Config):
        """`scale` times the gradient of V, whose length is clipped to the share `clip` of the network's output, at
        noise levels from `low` to `high`. With a noisy `step` it moves that step's mean, else the ODE's direction."""

        kind: Literal["guidance"] = "guidance"
        scale: NonNegativeFloat = 4.0
        clip: PositiveFloat = 0.1
        low: Fraction = 0.2
        high: Fraction = 0.95

    @classmethod
    def problems(cls, config: Section, sigmas: np.ndarray, unjudged: str | None) -> Iterator[str]:
        yield from super().problems(config, sigmas, unjudged)
        if not ((sigmas[:-1] >= config.low) & (sigmas[:-1] <= config.high)).any():
            levels = ", ".join(f"{sigma:.2f}" for sigma in sigmas[:-1])
            yield (
                f"no step has a noise level from steer.low {config.low:g} to steer.high {config.high:g}, so nothing "
                f"would be guided; the levels are {levels}"
            )

    @cached_property
    def gains(self) -> np.ndarray:
        """`guidance_gains`, 0 outside the levels that are guided."""
        sigma = self.step.sigmas[:-1]
        return np.where((sigma >= self.config.low) & (sigma <= self.config.high), guidance_gains(self.step), 0.0)

    def push(self, k: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if not self.gains[k]:
            return output
        return output + self.config.scale * self.gains[k] * clipped(self.gradient(k, x), output, self.config.clip)


class GuidedBestOfN(Guidance, BestOfN):
    """Every one of n images follows the gradient; the best one is kept."""

    class Config(Guidance.Config, BestOfN.Config):
        kind: Literal["guided_best_of_n"] = "guided_best_of_n"


STEERING = {"best_of_n": BestOfN, "smc": Smc, "guidance": Guidance, "guided_best_of_n": GuidedBestOfN}
