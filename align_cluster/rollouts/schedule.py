"""Settings that choose a flow model's noise levels. The levels themselves are in `backbones/levels.py`.

ADD A SCHEDULE HERE: write a class with Config and `sigmas`, and add a line to SCHEDULES.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
from pydantic import PositiveFloat

from align_cluster.backbones.levels import flux_sigmas, linear_sigmas, sd3_sigmas
from align_cluster.settings import Section


class Schedule(ABC):
    """Chooses the noise levels of a flow model.

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
        """Return noise levels [N + 1], fp64, from 1 to 0.

        `native` returns the pipeline's own levels for a number of steps, and `tokens` is the image's number of tokens.
        """


class NativeSchedule(Schedule):
    """Takes the pipeline's own levels."""

    class Config(Section):
        """The native schedule has no settings."""

        kind: Literal["native"] = "native"

    native = True

    def sigmas(self, steps: int, native: Callable[[int], np.ndarray], tokens: int) -> np.ndarray:
        """Return the pipeline's own levels."""
        return native(steps)


class Sd3Schedule(Schedule):
    """Takes SD3's levels, which apply the shift twice."""

    class Config(Section):
        """Configures SD3's schedule."""

        kind: Literal["sd3"] = "sd3"
        shift: PositiveFloat = 3.0
        """How far steps move towards high noise; 1 moves none, and larger values give more noisy steps. SD3.5 Medium
        uses 3."""

    tiny_last_level = True

    def sigmas(self, steps: int, native: Callable[[int], np.ndarray], tokens: int) -> np.ndarray:
        """Return `sd3_sigmas` for the configured shift."""
        return sd3_sigmas(steps, self.config.shift)


class LinearSchedule(Schedule):
    """Takes equal steps, shifted once, as DanceGRPO, MixGRPO and SRPO do."""

    class Config(Section):
        """Configures the linear schedule."""

        kind: Literal["linear"] = "linear"
        shift: PositiveFloat = 3.0
        """How far steps move towards high noise; 1 moves none, and larger values give more noisy steps. DanceGRPO,
        MixGRPO and SRPO use 3 for FLUX."""

    def sigmas(self, steps: int, native: Callable[[int], np.ndarray], tokens: int) -> np.ndarray:
        """Return `linear_sigmas` for the configured shift."""
        return linear_sigmas(steps, self.config.shift)


class FluxSchedule(Schedule):
    """Takes FLUX's levels, with a shift that grows with the size of the image."""

    class Config(Section):
        """Configures FLUX's schedule. Its shift is between the two settings, by the number of image tokens."""

        kind: Literal["flux"] = "flux"
        base_shift: float = 0.5
        """The natural logarithm of the shift for images of 256 tokens, which is 256 x 256 pixels. 0.5 is the FLUX.1-dev
        pipeline's."""
        max_shift: float = 1.15
        """The natural logarithm of the shift for images of 4,096 tokens, which is 1024 x 1024 pixels. 1.15 is the
        FLUX.1-dev pipeline's."""

    def sigmas(self, steps: int, native: Callable[[int], np.ndarray], tokens: int) -> np.ndarray:
        """Return `flux_sigmas` for the image's number of tokens."""
        return flux_sigmas(steps, tokens, self.config.base_shift, self.config.max_shift)


SCHEDULES = {"native": NativeSchedule, "sd3": Sd3Schedule, "linear": LinearSchedule, "flux": FluxSchedule}
