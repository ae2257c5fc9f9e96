"""The maths of reward gradients: pure functions of latents, noise and the network's output, in fp32.

x_t = a x0 + s eps with the noise level s. a is 1 - s for networks that predict a flow's velocity v = eps - x0, and
sqrt(1 - s^2) for those that predict epsilon or v = a eps - s x0. All levels are [b], latents and outputs [b, C, H, W].
"""

from collections.abc import Iterator

import torch

from align_cluster.backbones.noising import Prediction, like, signal
from align_cluster.rewards import REWARDS
from align_cluster.settings import Root


def recover(
    x: torch.Tensor,
    output: torch.Tensor,
    noise: torch.Tensor,
    level: torch.Tensor,
    target: torch.Tensor,
    prediction: Prediction,
) -> torch.Tensor:
    """Return x0 from x_t by Direct-Align (Shen et al. 2025, arXiv 2509.06942, eq. 5).

    The noise of x_t at `level` is known. The model steps from `level` to `target` (below: it denoises; above: it
    inverts), and the known noise is subtracted there. The result is exact if the output is. For a velocity the divisor
    is the signal at `target`, since a step of the flow also changes the signal; for epsilon it is the signal at
    `level`, as printed.
    """
    start, end = like(level, x), like(target, x)
    if prediction == "flow":
        return (x + (end - start) * output - end * noise) / (1 - end)
    kept = like(signal(level, prediction), x)
    eps = output if prediction == "epsilon" else kept * output + start * x
    return (x + (end - start) * eps - end * noise) / kept


def margin_problems(margin: float | None, where: str, run: Root) -> Iterator[str]:
    """Yield a sentence where the trained rewards of ordinary images reach `margin`, at which gradients stop."""
    trained = [run.rewards[name] for name in run.trained]
    typical = sum(reward.weight * REWARDS[reward.kind](reward).usual for reward in trained)
    if margin is not None and typical > margin:
        yield (
            f"{where}.margin is {margin:g}, and trained rewards are usually about {typical:g}: gradients stop at the "
            "margin, so nothing would be learned; set it to null, or above what is to be reached"
        )
