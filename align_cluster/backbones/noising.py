"""Noise on latents and its removal: pure functions of latents, noise levels and the network's output, in fp32.

x_t = a x0 + s eps with the noise level s. a is 1 - s for networks that predict a flow's velocity v = eps - x0, and
sqrt(1 - s^2) for those that predict epsilon or v = a eps - s x0. All levels are [b], latents and outputs [b, C, H, W].
"""

from typing import Literal

import torch

Prediction = Literal["flow", "epsilon", "v"]


def like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return values [b] in the device and type of x [b, ...], with as many axes."""
    return values.to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))


def signal(level: torch.Tensor, prediction: Prediction) -> torch.Tensor:
    """Return the signal level a at noise levels s."""
    return 1 - level if prediction == "flow" else torch.sqrt(1 - level**2)


def noised(x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, prediction: Prediction) -> torch.Tensor:
    """Return x_t: x0 with noise added up to a noise level."""
    return like(signal(level, prediction), x0) * x0 + like(level, x0) * noise


def clean(x: torch.Tensor, output: torch.Tensor, level: torch.Tensor, prediction: Prediction) -> torch.Tensor:
    """Return the x0 that an output at x_t implies: ReFL's one-step prediction, which is blurred at high noise."""
    s, a = like(level, x), like(signal(level, prediction), x)
    if prediction == "flow":
        return x - s * output
    return (x - s * output) / a if prediction == "epsilon" else a * x - s * output
