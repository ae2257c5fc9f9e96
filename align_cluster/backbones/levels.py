"""Noise levels of published pipelines: pure functions of the number of steps, fp64."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from align_cluster.errors import UserError

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_UNKNOWN_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")


def shift_map(t: np.ndarray | float, shift: float) -> np.ndarray | float:
    """Apply SD3's resolution shift to a noise level: t -> s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def _closed(levels: np.ndarray) -> np.ndarray:
    """Append 0 to levels [N] and set the first level to exactly 1."""
    sigmas = np.append(levels, 0.0)
    sigmas[0] = 1.0  # rounding leaves 1 - 1e-16 for some shifts, which an SDE step would divide by
    return sigmas


def sd3_sigmas(steps: int, shift: float) -> np.ndarray:
    """Return noise levels [N + 1] as diffusers' FlowMatchEulerDiscreteScheduler builds them from its config.

    The shift applies twice to the inner points: once to the end point 1/1000, once to the whole table. Released SD3.5
    results were made with these levels, so this function reproduces them. The last level before 0 is therefore tiny.
    """
    return _closed(shift_map(np.linspace(1.0, shift_map(0.001, shift), steps), shift))


def linear_sigmas(steps: int, shift: float) -> np.ndarray:
    """Return equal steps from 1 to 0, shifted: noise levels [N + 1] of DanceGRPO, MixGRPO and SRPO for FLUX."""
    return _closed(shift_map(np.linspace(1.0, 0.0, steps + 1)[:-1], shift))


def flux_sigmas(
    steps: int,
    tokens: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> np.ndarray:
    """Return noise levels [N + 1] of the FLUX.1-dev pipeline for an image of `tokens` tokens (height/16 x width/16).

    The shift is e^mu, and mu grows linearly from base_shift at base_tokens to max_shift at max_tokens.
    """
    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    return _closed(shift_map(np.linspace(1.0, 1.0 / steps, steps), np.exp(mu)))


def pipeline_sigmas(scheduler: Mapping[str, Any], steps: int, tokens: int, equal: bool) -> np.ndarray:
    """Return the noise levels [N + 1] that a pipeline gets from its FlowMatchEulerDiscreteScheduler's config.

    `equal` pipelines (FLUX, Qwen-Image) pass equal steps from 1 to 1/N to the scheduler; others (SD3) leave the choice
    to it. Raises UserError for another scheduler, or for an option that this function does not reproduce.
    """
    odd = [name for name in _UNKNOWN_LEVELS if scheduler.get(name)]
    if scheduler.get("_class_name", _SCHEDULER) != _SCHEDULER or odd:
        what = odd[0] if odd else scheduler["_class_name"]
        raise UserError(
            f"backbone.path: its scheduler has {what}, whose noise levels are not known here; set rollout.schedule to "
            f"sd3, linear or flux, or give a pipeline with a plain {_SCHEDULER}"
        )
    shift, dynamic = scheduler.get("shift", 1.0), scheduler.get("use_dynamic_shifting", False)
    if not (equal or dynamic or scheduler.get("shift_terminal")):
        return sd3_sigmas(steps, shift)
    levels = np.linspace(1.0, 1 / steps if equal else 0.001 if dynamic else shift_map(0.001, shift), steps)
    if dynamic:
        low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        base, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        mu = base + (most - base) * (tokens - low) / (high - low)
        shift = mu if scheduler.get("time_shift_type") == "linear" else np.exp(mu)
    levels = shift_map(levels, shift)
    if (terminal := scheduler.get("shift_terminal")) and steps > 1:  # one level is 1 anyway
        levels = 1 - (1 - levels) * (1 - terminal) / (1 - levels[-1])
    return _closed(levels)


def ddim_timesteps(steps: int, train_steps: int = 1000, offset: int = 1) -> np.ndarray:
    """Return training timesteps [N], falling, with "leading" spacing, as Stable Diffusion 1 and 2 use it.

    Raises UserError if the model has too few timesteps.
    """
    if steps > train_steps - offset:
        raise UserError(
            f"{steps} denoising steps do not fit a model with {train_steps} noise levels; "
            f"set rollout.steps and evaluate.steps to at most {train_steps - offset}"
        )
    return np.arange(steps)[::-1] * (train_steps // steps) + offset


def diffusion_levels(train_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> np.ndarray:
    """Return noise levels sqrt(1 - alpha_bar) [train_steps] of all training timesteps under scaled-linear betas.

    Stable Diffusion 1 and 2 are trained with them.
    """
    return np.sqrt(1 - np.cumprod(1 - np.linspace(beta_start**0.5, beta_end**0.5, train_steps) ** 2))


def ddim_levels(
    steps: int, train_steps: int = 1000, offset: int = 1, beta_start: float = 0.00085, beta_end: float = 0.012
) -> np.ndarray:
    """Return the `diffusion_levels` [N + 1] of `ddim_timesteps`.

    The last level is that of timestep 0, as in DanceGRPO, and not 0, so that the last step has a density too.
    """
    levels = diffusion_levels(train_steps, beta_start, beta_end)
    return levels[np.append(ddim_timesteps(steps, train_steps, offset), 0)]
