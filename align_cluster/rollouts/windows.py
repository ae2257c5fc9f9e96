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
        """Configures the fraction and the choice of steps.

        `first` and `random` (a seeded choice for each training step) take the fraction of all steps, as Flow-GRPO does.
        `per_sample` takes the fraction of the trainable steps, with a choice for each sample: DanceGRPO.
        """

        kind: Literal["fraction"] = "fraction"
        fraction: Annotated[float, Field(gt=0, le=1)] = 0.99
        choice: Literal["first", "random", "per_sample"] = "first"

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
        """Configures the sliding window, and how long it stays at each start.

        progressive   `iters_per_group` training steps
        random        a seeded start for each training step
        decay         `max_iters` at the first start, falling linearly to `min_iters` at the last
        exp_decay     iters_per_group exp(-0.1 (start - 13)) from start 13 on

        After the last window, `roll_back` begins again; without it the window stays there.
        """

        kind: Literal["sliding"] = "sliding"
        size: PositiveInt = 4
        stride: PositiveInt = 1
        iters_per_group: PositiveInt = 25
        strategy: Literal["progressive", "random", "decay", "exp_decay"] = "progressive"
        max_iters: PositiveInt = 25
        min_iters: PositiveInt = 6
        roll_back: bool = True

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
        """Configures the short window.

        It lies in the steps lo ... hi - 1 of `range` [lo, hi]; null is the first half of the rollout.
        """

        kind: Literal["fast"] = "fast"
        size: PositiveInt = 2
        range: tuple[NonNegativeInt, NonNegativeInt] | None = None

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
