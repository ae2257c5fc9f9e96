"""Windows: which denoising steps of a training step draw noise, and which of those are trained.

A plan is a pure function of (steps of a rollout, training step, seed), so every worker and every resumed run makes the
same plan. The terminal step is never trained, because it has (almost) no noise and hence no usable density.

ADD A WINDOW HERE: write a class with Config, `plan`, `width` and, where settings may not fit, `problem`; add a line to
WINDOWS.
"""

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from align_cluster.settings import Section


@dataclass(frozen=True)
class Window:
    """Holds one training step's plan: indices of denoising steps, ascending.

    The `noisy` steps draw noise, and all others are ODE steps. Each sample is trained on `keep` of the `trained` steps:
    on all of them, or on a choice of its own.
    """

    noisy: tuple[int, ...]
    trained: tuple[int, ...]
    keep: int


class WindowKind(ABC):
    """Plans windows by a rule. Steps are counted from 0, the noisiest."""

    Config: type[Section]

    def __init__(self, config: Section) -> None:
        self.config = config

    @abstractmethod
    def plan(self, steps: int, step: int, seed: int) -> Window:
        """Return the window of training step `step` (from 0) in rollouts of `steps`; `seed` is that step's own."""

    @abstractmethod
    def width(self, steps: int) -> int:
        """Return the largest number of steps that a sample is trained on at once."""

    @property
    def per_sample(self) -> bool:
        """Tell whether each sample is trained on steps of its own."""
        return False

    def problem(self, steps: int) -> str | None:
        """Return a sentence for the user if the settings do not fit a rollout of `steps`, else None."""
        return None


def trainable(steps: int) -> int:
    """Return how many steps of a rollout can be trained: all but the terminal one."""
    return max(1, steps - 1)


def _contiguous(start: int, stop: int) -> Window:
    span = tuple(range(start, stop))
    return Window(span, span, len(span))


class FractionWindow(WindowKind):
    """Draws noise at every step and trains a fraction of them, as Flow-GRPO and DanceGRPO do."""

    class Config(Section):
        """Configures the fraction and the choice of steps."""

        kind: Literal["fraction"] = "fraction"
        fraction: Annotated[float, Field(gt=0, le=1)] = 0.99
        """The share of denoising steps that are trained, rounded down: of all steps, or with `choice: per_sample` of
        all but the last one. Flow-GRPO uses 0.99; DanceGRPO uses 0.6 for FLUX and 1 for SD1.4."""
        choice: Literal["first", "random", "per_sample"] = "first"
        """Which steps are trained: the `first` ones (Flow-GRPO), `random` ones that change with every training step, or
        random ones for every sample (`per_sample`: DanceGRPO). ppo refuses `per_sample`."""

    def plan(self, steps: int, step: int, seed: int) -> Window:
        """All steps are noisy, and the choice decides which ones are trained."""
        usable, keep = range(trainable(steps)), self.width(steps)
        if self.config.choice == "first":
            usable = usable[:keep]
        elif self.config.choice == "random":
            usable = sorted(random.Random(seed).sample(usable, keep))
        return Window(tuple(range(steps)), tuple(usable), keep)

    def width(self, steps: int) -> int:
        """Return the fraction as a number of steps, at least 1."""
        counted = trainable(steps) if self.config.choice == "per_sample" else steps
        return max(1, min(trainable(steps), int(counted * self.config.fraction)))

    @property
    def per_sample(self) -> bool:
        """Return whether `choice` is per_sample."""
        return self.config.choice == "per_sample"


class SlidingWindow(WindowKind):
    """Moves the window from the noisiest steps to the cleanest: MixGRPO (Li et al. 2025, arXiv 2507.21802).

    Windows start at every `stride`-th step up to the last trainable one, so the last windows are shorter.
    """

    class Config(Section):
        """Configures the sliding window, and how long it stays at each start."""

        kind: Literal["sliding"] = "sliding"
        size: PositiveInt = 4
        """The number of denoising steps in the window. MixGRPO uses 4 of 25."""
        stride: PositiveInt = 1
        """The number of denoising steps that the window moves at once. MixGRPO uses 1."""
        iters_per_group: PositiveInt = 25
        """The number of training steps that the window stays at a place, with `progressive` and `exp_decay`. MixGRPO
        uses 25."""
        strategy: Literal["progressive", "random", "decay", "exp_decay"] = "progressive"
        """How long the window stays at a place. `progressive` stays iters_per_group training steps; `exp_decay` does so
        until step 13 and then exp(-0.1 (start - 13)) times as long. `decay` falls linearly from max_iters to min_iters,
        and `random` takes a random place for every training step."""
        max_iters: PositiveInt = 25
        """The number of training steps that the window stays at its first place, with `decay`."""
        min_iters: PositiveInt = 6
        """The number of training steps that the window stays at its last place, with `decay`."""
        roll_back: bool = True
        """Whether the window begins again after its last place. Otherwise it stays there."""

    def plan(self, steps: int, step: int, seed: int) -> Window:
        """Walk the starts until the one that training step `step` belongs to."""
        config, usable = self.config, trainable(steps)
        if config.strategy == "random":
            start = random.Random(seed).randint(0, usable - config.size)
            return _contiguous(start, start + config.size)
        start = 0
        while step >= (stay := self.iters(start, usable - 1)):
            step -= stay
            if start + config.stride < usable:
                start += config.stride
            elif config.roll_back:
                start = 0
            else:
                break
        return _contiguous(start, min(start + config.size, usable))

    def iters(self, start: int, last_start: int) -> int:
        """Return the number of training steps that the window stays at `start`."""
        config = self.config
        if config.strategy == "decay":
            progress = start / max(1, last_start)
            return max(1, int(config.max_iters * (1 - progress) + config.min_iters * progress))
        if config.strategy == "exp_decay":
            return math.ceil(config.iters_per_group * math.exp(-0.1 * max(0, start - 13)))
        return config.iters_per_group

    def width(self, steps: int) -> int:
        """Return the window's size."""
        return self.config.size

    def problem(self, steps: int) -> str | None:
        """The window must fit the trainable steps."""
        if self.config.size > trainable(steps):
            return (
                f"rollout.window.size is {self.config.size}, and a rollout of {steps} steps has {trainable(steps)} "
                f"that can be trained; set it to at most {trainable(steps)}"
            )
        return None


class FastWindow(WindowKind):
    """Draws a short window among the noisier steps, anew for each training step: Flow-GRPO-Fast."""

    class Config(Section):
        """Configures the short window."""

        kind: Literal["fast"] = "fast"
        size: PositiveInt = 2
        """The number of denoising steps in the window. Flow-GRPO-Fast uses 2 to 3."""
        range: tuple[NonNegativeInt, NonNegativeInt] | None = None
        """The denoising steps [lo, hi] that the window lies in, from lo to hi - 1 and counted from 0, the noisiest.
        Null takes the first half of the rollout, as Flow-GRPO-Fast does."""

    def _range(self, steps: int) -> tuple[int, int]:
        return self.config.range or (0, max(1, steps // 2))

    def plan(self, steps: int, step: int, seed: int) -> Window:
        """Draw a start so that the window fits the range."""
        low, high = self._range(steps)
        start = random.Random(seed).randint(low, high - self.config.size)
        return _contiguous(start, start + self.config.size)

    def width(self, steps: int) -> int:
        """Return the window's size."""
        return self.config.size

    def problem(self, steps: int) -> str | None:
        """The range must hold the window and end with the last trainable step or before."""
        low, high = self._range(steps)
        if high > trainable(steps):
            return (
                f"rollout.window.range ends at {high}, and a rollout of {steps} steps has {trainable(steps)} "
                f"that can be trained; let it end at {trainable(steps)} or before"
            )
        if high <= low:
            return f"rollout.window.range is [{low}, {high}], which holds no step; its end must lie above its start"
        if self.config.size > high - low:
            where = "rollout.window.range" if self.config.range else f"the first half of a rollout of {steps} steps"
            return (
                f"rollout.window.size is {self.config.size}, and {where} has {high - low}; "
                f"set it to at most {high - low}"
            )
        return None


WINDOWS = {"fraction": FractionWindow, "sliding": SlidingWindow, "fast": FastWindow}
