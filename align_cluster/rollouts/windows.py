"""Which denoising steps of a training step draw noise, and which of those are trained.

A plan is a pure function of (steps of a rollout, training step, seed), so that every worker and every resumed run makes
the same one. The terminal step is never trained: it has (almost) no noise, hence no usable density.

ADD A WINDOW HERE: a class with Config, `plan`, `width` and, where settings may not fit, `problem`; and a line in
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
    """One training step's plan: indices of denoising steps, ascending.

    `noisy` steps draw noise and all others are ODE steps. Each sample is trained on `keep` of the `trained` ones: on
    all of them, unless they are chosen per sample.
    """

    noisy: tuple[int, ...]
    trained: tuple[int, ...]
    keep: int


class WindowKind(ABC):
    """A rule for windows. Steps are counted from 0, the noisiest."""

    Config: type[Section]

    def __init__(self, config: Section) -> None:
        self.config = config

    @abstractmethod
    def plan(self, steps: int, step: int, seed: int) -> Window:
        """The window of training step `step` (from 0) in rollouts of `steps`; `seed` is that training step's."""

    @abstractmethod
    def width(self, steps: int) -> int:
        """The most steps that a sample is trained on at once."""

    @property
    def per_sample(self) -> bool:
        """Whether each sample is trained on steps of its own."""
        return False

    def problem(self, steps: int) -> str | None:
        """What keeps the settings from fitting a rollout of `steps`, as a sentence for the user."""
        return None


def trainable(steps: int) -> int:
    """How many steps of a rollout can be trained: all but the terminal one."""
    return max(1, steps - 1)


def _contiguous(start: int, stop: int) -> Window:
    span = tuple(range(start, stop))
    return Window(span, span, len(span))


class FractionWindow(WindowKind):
    """Noise at every step, and a fraction of them trained: Flow-GRPO and DanceGRPO."""

    class Config(Section):
        """`first` and `random` (a seeded choice a training step) count the fraction in all steps, as Flow-GRPO does.

        `per_sample` counts it in the steps that can be trained, and each sample has its own choice: DanceGRPO.
        """

        kind: Literal["fraction"] = "fraction"
        fraction: Annotated[float, Field(gt=0, le=1)] = 0.99
        choice: Literal["first", "random", "per_sample"] = "first"

    def plan(self, steps: int, step: int, seed: int) -> Window:
        usable, keep = range(trainable(steps)), self.width(steps)
        if self.config.choice == "first":
            usable = usable[:keep]
        elif self.config.choice == "random":
            usable = sorted(random.Random(seed).sample(usable, keep))
        return Window(tuple(range(steps)), tuple(usable), keep)

    def width(self, steps: int) -> int:
        counted = trainable(steps) if self.config.choice == "per_sample" else steps
        return max(1, min(trainable(steps), int(counted * self.config.fraction)))

    @property
    def per_sample(self) -> bool:
        """Return whether `choice` is per_sample."""
        return self.config.choice == "per_sample"


class SlidingWindow(WindowKind):
    """MixGRPO (Li et al. 2025, arXiv 2507.21802): a window that moves from the noisiest steps to the cleanest.

    It begins at every `stride`-th step up to the last that can be trained, so the last windows are shorter.
    """

    class Config(Section):
        """`progressive`: the window stays for `iters_per_group` training steps. `random`: a seeded start each time.

        `decay`: it stays for `max_iters` at the first start, falling linearly to `min_iters` at the last. `exp_decay`:
        iters_per_group exp(-0.1 (start - 13)) from start 13 on. After the last window `roll_back` begins again;
        otherwise the window stays there.
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
        """Training steps that the window stays at `start`."""
        config = self.config
        if config.strategy == "decay":
            progress = start / max(1, last_start)
            return max(1, int(config.max_iters * (1 - progress) + config.min_iters * progress))
        if config.strategy == "exp_decay":
            return math.ceil(config.iters_per_group * math.exp(-0.1 * max(0, start - 13)))
        return config.iters_per_group

    def width(self, steps: int) -> int:
        return self.config.size

    def problem(self, steps: int) -> str | None:
        if self.config.size > trainable(steps):
            return (
                f"rollout.window.size is {self.config.size}, and a rollout of {steps} steps has {trainable(steps)} "
                f"that can be trained; set it to at most {trainable(steps)}"
            )
        return None


class FastWindow(WindowKind):
    """Flow-GRPO-Fast: a short window at a seeded place among the noisier steps, drawn anew each training step."""

    class Config(Section):
        """The window lies in the steps lo ... hi - 1 of `range` [lo, hi]; null: the first half of the rollout."""

        kind: Literal["fast"] = "fast"
        size: PositiveInt = 2
        range: tuple[NonNegativeInt, NonNegativeInt] | None = None

    def _range(self, steps: int) -> tuple[int, int]:
        return self.config.range or (0, max(1, steps // 2))

    def plan(self, steps: int, step: int, seed: int) -> Window:
        low, high = self._range(steps)
        start = random.Random(seed).randint(low, high - self.config.size)
        return _contiguous(start, start + self.config.size)

    def width(self, steps: int) -> int:
        return self.config.size

    def problem(self, steps: int) -> str | None:
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
