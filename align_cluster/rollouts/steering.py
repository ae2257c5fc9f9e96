"""Steering with a critic while images are drawn, after "Explicit Critic Guidance" (arXiv 2605.27736): best of n,
sequential Monte Carlo, the critic's gradient, and that gradient with best of n. The paper names the modes; the formulas
here are reconstructed from the literature that each function names.

The value function predicts values [B, R] of noisy latents, one for each of R rewards, in units of the normalised
rewards. `shares` [R] weigh them to one value V. Rewards [n, R] come in the same units, NaN where a reward has no score.
A value that is not finite says nothing: it never makes a row be preferred, and a gradient that is not finite pushes
nothing. `not_finite` in samples.json counts both.

To add a mode, write a class with a Config and those methods of Steering that it changes, and add a line to STEERING.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Annotated, Literal, Union

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from align_cluster.errors import UserError
from align_cluster.rollouts.steps import STEPS, Step
from align_cluster.settings import Fraction, Section

ValueFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [B, C, H, W], sigma [B]) -> [B, R]
# dpm2 remembers the rows of the step before, and steering may have replaced them since.
SINGLE_STEPS = {name: kind for name, kind in STEPS.items() if not kind.multistep}
SingleStep = Annotated[
    Union[tuple(kind.Config for kind in SINGLE_STEPS.values())],  # noqa: UP007 - made of a dict
    Field(discriminator="kind"),
]
SIGNAL = 0.05  # least 1 - sigma that the ODE's guidance divides by; smaller ones would let the gradient explode
BATCH = 8  # latents that go through a network at once, so that a large n does not decide how much memory is needed


def normalised(log_weights: np.ndarray) -> np.ndarray:
    """Turn log-weights [n], at least one of them finite, into weights [n] that sum to 1; -inf becomes 0."""
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def effective_size(weights: np.ndarray) -> float:
    """Return how many equally weighted particles the normalised weights [n] are worth: 1 / sum w^2, from 1 to n."""
    return float(1 / (weights**2).sum())


def systematic(weights: np.ndarray, offset: float) -> np.ndarray:
    """Return the ancestors int64 [n] that systematic resampling (Kitagawa 1996) picks by normalised weights [n].

    The ancestors lie under n equally spaced points, moved by `offset` in [0, 1). With a uniform offset particle i is
    picked n w_i times on average, and always that number rounded down or up; one of weight 0 never is.
    """
    points, alive = (offset + np.arange(len(weights))) / len(weights), np.flatnonzero(weights)
    return alive[np.searchsorted(np.cumsum(weights[alive])[:-1], points, side="right")]


def weighted(rewards: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return the weighted mean [n] of those rewards [n, R] that are finite, and NaN where none of a row is.

    Shares [R] may have either sign; a mean divides by the sum of their sizes.
    """
    known = np.isfinite(rewards)
    total = (np.abs(shares) * known).sum(1)
    return np.divide(np.where(known, rewards, 0.0) @ shares, total, out=np.full(len(rewards), np.nan), where=total > 0)


def guidance_gains(step: Step) -> np.ndarray:
    """Return, for each of N steps, the factor [N] (fp64) of grad V before it is added to the network's output.

    A step that draws noise of std s gets the mean mu + s^2 grad V, as a Gaussian tilted by exp(V) has. A step without
    noise gets the score + grad V (Dhariwal & Nichol 2021, arXiv 2105.05233), which is v - sigma / (1 - sigma) grad V
    for a flow.
    """
    sigma = step.sigmas[:-1]
    signal = {"flow": 1 - sigma, "epsilon": np.ones_like(sigma), "v": np.sqrt(1 - sigma**2)}[step.prediction]
    gains = -sigma / np.maximum(signal, SIGNAL)
    if step.has_density:
        table, noisy = step.coefficients(), [step.is_noisy(k) for k in range(len(sigma))]
        gains = np.where(noisy, table.std**2 / table.output, gains)
    return gains


def clipped(push: torch.Tensor, output: torch.Tensor, ratio: float) -> torch.Tensor:
    """Shorten each of the pushes [B, ...] to at most `ratio` times the length of the output beside it."""
    size, most = push.flatten(1).norm(dim=1), ratio * output.flatten(1).norm(dim=1)
    factor = (most / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1)
    return push * factor.view(-1, *[1] * (push.ndim - 1))


class Steering:
    """Steers one rollout as the hook `denoise.Steer`, and chooses which of its rows are kept. The base changes nothing.

    `needs_noise` says that the mode is of no use with deterministic steps. `origin` [B] is the index of the seed that
    each row began with. `values` [B, R] are the critic's last predictions for the rows, NaN before the first one.
    `forwards` and `backwards` count the critic's passes, one for each latent, and `not_finite` the rows whose value or
    gradient was not finite in one of them.
    """

    class Config(Section):
        """Holds the settings that all modes share."""

        step: SingleStep | None = None
        """How one denoising step is taken. Null takes the ODE's steps, as plain sampling does, and for smc the run's
        own kind, which must draw noise."""

        @property
        def tries(self) -> int | None:
            """Number of images that are begun for each one that is kept; None where every image is kept."""
            return None

    needs_noise = False

    def __init__(
        self, config: Section, *, step: Step, value_function: ValueFunction, shares: np.ndarray, seeds: Sequence[int]
    ) -> None:
        """Begin a rollout with one row for each seed, over the noise levels of `step`."""
        self.config, self.step, self.value_function, self.shares = config, step, value_function, shares
        self.origin, self.values = np.arange(len(seeds)), np.full((len(seeds), len(shares)), np.nan)
        self.random = random.Random(seeds[0])
        self.forwards = self.backwards = self.not_finite = 0

    @classmethod
    def problems(cls, config: Section, sigmas: np.ndarray, unjudged: str | None) -> Iterator[str]:
        """Yield one sentence for each setting that cannot work with noise levels [N + 1].

        `unjudged` is the text of a prompt whose images no reward scores, None where there is no such prompt.
        """
        yield from ()

    def choose(self, rewards: np.ndarray) -> list[int]:
        """Return the indices of the final rows to keep, by their rewards [n, R]."""
        return list(range(len(rewards)))

    def facts(self) -> dict[str, object]:
        """Return what the mode reports about this rollout, for samples.json."""
        return {"not_finite": self.not_finite} if self.not_finite else {}

    def select(self, k: int, x: torch.Tensor) -> list[int] | None:
        """Return the rows of x that step k goes on with; None keeps all as they are."""
        return None

    def push(self, k: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return what step k takes in the place of the network's output."""
        return output

    def evaluate(self, k: int, x: torch.Tensor) -> np.ndarray:
        """Ask the critic for V [B] of the rows that step k starts from; NaN where it is not finite."""
        with torch.no_grad():
            self.values = torch.cat([self._predict(k, part) for part in x.split(BATCH)]).double().cpu().numpy()
        v = self.values @ self.shares
        known = np.isfinite(v)
        self.not_finite += int((~known).sum())
        return np.where(known, v, np.nan)

    def keep_rows(self, rows: np.ndarray) -> list[int]:
        """Reorder the records of the rows to the kept ones, and return those for `select`."""
        self.origin, self.values = self.origin[rows], self.values[rows]
        return rows.tolist()

    def gradient(self, k: int, x: torch.Tensor) -> torch.Tensor:
        """Return the gradient of V at the rows that step k starts from, 0 where it is not finite; it is like x."""
        gradients, values = [], []
        for part in x.split(BATCH):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                values.append(self._predict(k, part))
                total = values[-1] @ torch.tensor(self.shares, dtype=part.dtype, device=part.device)
                gradients += torch.autograd.grad(total.sum(), part)
        self.values = torch.cat(values).detach().double().cpu().numpy()
        self.backwards += len(x)
        gradient = torch.cat(gradients)
        known = torch.isfinite(gradient.flatten(1)).all(1)
        self.not_finite += int((~known).sum())
        return gradient.where(known.view(-1, *[1] * (x.ndim - 1)), 0.0)

    def _predict(self, k: int, x: torch.Tensor) -> torch.Tensor:
        self.forwards += len(x)
        return self.value_function(x, x.new_full((len(x),), float(self.step.sigmas[k])))


class BestOfN(Steering):
    """Keeps the image of highest reward, or those that the critic values most at some step on the way."""

    class Config(Steering.Config):
        """Configures best of n."""

        kind: Literal["best_of_n"] = "best_of_n"
        n: PositiveInt = 8
        """The number of images that are begun for each one that is kept."""
        prune_at: NonNegativeInt | None = None
        """The denoising step from which on only the images that the critic values most go on, counted from 0, the
        noisiest. Null lets all go on, and the reward decides."""
        keep: PositiveInt = 1
        """The number of images that go on after `prune_at`. With 1 the critic alone decides, and no reward is asked."""

        @property
        def tries(self) -> int:
            """Number of images that are begun for each one that is kept."""
            return self.n

    @classmethod
    def problems(cls, config: Section, sigmas: np.ndarray, unjudged: str | None) -> Iterator[str]:
        """Yield what cannot be pruned, and a prompt whose images no reward can choose from."""
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
        """Keep the rows of highest V at step `prune_at`, in their old order; rows without a value come last."""
        if k != self.config.prune_at:
            return None
        best = np.argsort(-self.evaluate(k, x), kind="stable")[: self.config.keep]
        return self.keep_rows(np.sort(best))

    def choose(self, rewards: np.ndarray) -> list[int]:
        """Return the row of highest weighted reward of those that have one. Raises UserError where none has."""
        if len(rewards) == 1:
            return [0]
        totals = weighted(rewards, self.shares)
        if np.isnan(totals).all():
            raise UserError("no reward has a score by which to choose the best image; let the critic: steer.prune_at")
        return [int(np.nanargmax(totals))]


class Smc(Steering):
    """Sequential Monte Carlo (Del Moral et al. 2006): particles survive in proportion to exp(strength x gain of V).

    The last V is the reward R, so the product of the weights is exp(strength (R - V_0)). A particle without a finite
    value gets weight 0 until the next resampling replaces it. Where none has one, the weights stay as they are, and the
    next values are compared with the last known ones.
    """

    class Config(Steering.Config):
        """Configures sequential Monte Carlo."""

        kind: Literal["smc"] = "smc"
        n: PositiveInt = 8
        """The number of particles that are drawn for each image."""
        strength: PositiveFloat = 1.0
        """How strongly particles of higher value are preferred: the factor of the value, in units of the normalised
        reward, in the exponent of their weights. A large one leaves a single family of particles."""
        resample_below: Fraction = 0.5
        """The share of n below which the particles' effective number makes them be resampled. 0 never resamples."""
        pick: Literal["best", "sample"] = "best"
        """Which particle is kept: the one of highest reward (`best`), or one drawn by the weights (`sample`)."""

        @property
        def tries(self) -> int:
            """Number of particles that are begun for each image."""
            return self.n

    needs_noise = True

    def __init__(
        self, config: Section, *, step: Step, value_function: ValueFunction, shares: np.ndarray, seeds: Sequence[int]
    ) -> None:
        """Begin a rollout whose particles weigh the same."""
        super().__init__(config, step=step, value_function=value_function, shares=shares, seeds=seeds)
        self.log_weights, self.last_v = np.zeros(len(seeds)), np.full(len(seeds), np.nan)
        self.resampled: list[int] = []
        self.sizes: list[float] = []

    def select(self, k: int, x: torch.Tensor) -> list[int] | None:
        """Reweigh the particles at step k, and resample them where their effective size is too small."""
        weights = self._reweigh(self.evaluate(k, x))
        if effective_size(weights) >= self.config.resample_below * len(weights):
            return None
        rows = systematic(weights, self.random.random())
        self.resampled.append(k)
        self.last_v, self.log_weights = self.last_v[rows], np.zeros(len(rows))
        return self.keep_rows(rows)

    def choose(self, rewards: np.ndarray) -> list[int]:
        """Return the one particle that is kept; the critic's last prediction stands in where a reward has no score."""
        final = np.where(np.isfinite(rewards), rewards, self.values) @ self.shares
        weights = self._reweigh(final)
        if self.config.pick == "sample":
            return self.random.choices(range(len(final)), weights)
        alive = np.isfinite(self.log_weights) & np.isfinite(final)
        return [int(np.where(alive, final, -np.inf).argmax() if alive.any() else weights.argmax())]

    def facts(self) -> dict[str, object]:
        """Return the steps that resampled, and the effective number of particles before each step and at the end."""
        return {"resampled": self.resampled, "effective_size": self.sizes} | super().facts()

    def _reweigh(self, v: np.ndarray) -> np.ndarray:
        """Return the normalised weights [n] of the particles once they have the values v [n].

        A particle's first known value weighs nothing, because it has none before to be compared with.
        """
        known = np.isfinite(v)
        if (known & np.isfinite(self.log_weights)).any():
            gain = np.where(known, v, 0.0) - np.where(np.isnan(self.last_v), v, self.last_v)
            self.log_weights = np.where(known, self.log_weights + self.config.strength * gain, -np.inf)
            self.last_v = np.where(known, v, self.last_v)
        weights = normalised(self.log_weights)
        self.sizes.append(effective_size(weights))
        return weights


class Guidance(Steering):
    """Follows the critic's gradient."""

    class Config(Steering.Config):
        """Configures guidance by the critic. It moves a noisy step's mean, and without noise the ODE's direction."""

        kind: Literal["guidance"] = "guidance"
        scale: NonNegativeFloat = 4.0
        """The factor of the critic's gradient; 0 is plain sampling. Past some scale the value still rises and the
        reward falls, so try powers of 2. `clip` bounds what it does."""
        clip: PositiveFloat = 0.1
        """The largest length of the push, which is the scaled gradient as it is added to the network's output, as a
        share of that output's length. A larger push keeps its direction and is shortened to it."""
        low: Fraction = 0.2
        """The lowest noise level at which the gradient is followed."""
        high: Fraction = 0.95
        """The highest noise level at which the gradient is followed."""

    @classmethod
    def problems(cls, config: Section, sigmas: np.ndarray, unjudged: str | None) -> Iterator[str]:
        """Yield that no noise level lies between `low` and `high`."""
        yield from super().problems(config, sigmas, unjudged)
        if not ((sigmas[:-1] >= config.low) & (sigmas[:-1] <= config.high)).any():
            levels = ", ".join(f"{sigma:.2f}" for sigma in sigmas[:-1])
            yield (
                f"no step has a noise level from steer.low {config.low:g} to steer.high {config.high:g}, so nothing "
                f"would be guided; the levels are {levels}"
            )

    @cached_property
    def gains(self) -> np.ndarray:
        """The `guidance_gains` [N], with 0 outside the noise levels that are guided."""
        sigma = self.step.sigmas[:-1]
        return np.where((sigma >= self.config.low) & (sigma <= self.config.high), guidance_gains(self.step), 0.0)

    def push(self, k: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Add the scaled gradient, clipped, to the output of a guided step."""
        if not self.gains[k]:
            return output
        push = self.config.scale * self.gains[k] * self.gradient(k, x)
        return output + clipped(push, output, self.config.clip)


class GuidedBestOfN(Guidance, BestOfN):
    """Lets every one of n images follow the gradient, and keeps the best one."""

    class Config(Guidance.Config, BestOfN.Config):
        """Holds the settings of both modes."""

        kind: Literal["guided_best_of_n"] = "guided_best_of_n"


STEERING = {"best_of_n": BestOfN, "smc": Smc, "guidance": Guidance, "guided_best_of_n": GuidedBestOfN}
