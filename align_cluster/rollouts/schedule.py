"""Noise schedules: pure functions of the number of steps, fp64."""

import numpy as np


def shift_map(t: np.ndarray | float, shift: float) -> np.ndarray | float:
    """SD3's resolution shift of a noise level, t -> s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def sd3_sigmas(steps: int, shift: float) -> np.ndarray:
    """Noise levels [N + 1] as diffusers' FlowMatchEulerDiscreteScheduler builds them from its config.

    The shift is applied twice to the inner points (once to the end point 1/1000, once to the whole table): that is what
    released SD3.5 results were made with, so it is reproduced here. The last level before 0 is therefore tiny.
    """
    sigmas = np.append(shift_map(np.linspace(1.0, shift_map(0.001, shift), steps), shift), 0.0)
    sigmas[0] = 1.0  # rounding leaves 1 - 1e-16 for some shifts, which an SDE step would divide by
    return sigmas
