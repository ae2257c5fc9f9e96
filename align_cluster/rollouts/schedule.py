"""The settings that choose a flow model's noise levels; the levels themselves are in `backbones/levels.py`.

ADD A SCHEDULE HERE: a function, a class with Config and `sigmas`, and a line in SCHEDULES.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
from pydantic import PositiveFloat

from align_cluster.backbones.levels import flux_sigmas, linear_sigmas, sd3_sigmas
from align_cluster.settings import Section


class Schedule(ABC):
    """A choice of noise levels for a flow model.

    `native` says that the levels are the pipeline's own, `tiny_last_level` that the last step begins near 0, as SD3's
    does (at .009).
    """

    Config: type[Section]
    native: ClassVar[bool] = False
    tiny_last_level: ClassVar[bool] = False

    def __init__(self, config: Section) -> None:
        self.config = config

    @abstractmethod
    def sigmas(self, steps: int, native: Callable[[int], np.ndarray], tokens: int) -> np.ndarray:
        """Noise levels [N + 1], fp64, 1 ... 0. `native` gives the pipeline's own; `tokens` is the image's length."""


class NativeSchedule(Schedule):
    """The pipeline's own levels."""

    class Config(Section):
        kind: Literal["native"] = "native"

    native = True

    def sigmas(self, steps: int, native: Callable[[int], np.ndarray], tokens: int) -> np.ndarray:
        return native(steps)


class Sd3Schedule(Schedule):
    """SD3's levels, with their double shift."""

    class Config(Section):
        kind: Literal["sd3"] = "sd3"
        shift: PositiveFloat = 3.0

    tiny_last_level = True

    def sigmas(self, steps: int, native: Callable[[int], np.ndarray], tokens: int) -> np.ndarray:
        return sd3_sigmas(steps, self.config.shift)


class LinearSchedule(Schedule):
    """Equal steps, shifted once: DanceGRPO, MixGRPO and SRPO."""

    class Config(Section):
        kind: Literal["linear"] = "linear"
        shift: PositiveFloat = 3.0

    def sigmas(self, steps: int, native: Callable[[int], np.ndarray], tokens: int) -> np.ndarray:
        return linear_sigmas(steps, self.config.shift)


class FluxSchedule(Schedule):
    """FLUX's levels, whose shift grows with the size of the image."""

    class Config(Section):
        kind: Literal["flux"] = "flux"
        base_shift: float = 0.5
        max_shift: float = 1.15

    def sigmas(self, steps: int, native: Callable[[int], np.ndarray], tokens: int) -> np.ndarray:
        return flux_sigmas(steps, tokens, self.config.base_shift, self.config.max_shift)


SCHEDULES = {"native": NativeSchedule, "sd3": Sd3Schedule, "linear": LinearSchedule, "flux": FluxSchedule}
