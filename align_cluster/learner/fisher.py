"""Estimates how sharply a policy changes with its parameters: the Fisher's largest eigenvalue, and the score's norm.

A step of a * E[advantage * score] has KL <= a^2 lambda_max G^2 E[advantage^2] / 2, with G the largest norm of a
sample's score d log_prob / d theta (SLAS, appendix E). All of it counts per latent dimension, as the log-probs do.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from align_cluster.streams import stream


@dataclass(frozen=True)
class FisherEstimate:
    """Holds one estimate.

    `lambda_max` belongs to the samples of all ranks and is a bound from below that rises with the iterations.
    `score_norm` is the largest norm of a score among this rank's samples.
    """

    lambda_max: float
    score_norm: float


def probing() -> AbstractContextManager[None]:
    """Switch fused attention off for the forward pass that is probed, because it has no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def fisher_product(
    mean: torch.Tensor, std: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function v -> H v, flat fp32 [P], of Gaussians N(mean_i, std_i^2):

    H = mean_i J_i^T J_i / (std_i^2 D).

    mean is [b, ...] with its graph, std is [b]. D is the number of dimensions of mean_i, and J_i [D, P] its derivative
    by the parameters. A parameter that the mean does not depend on counts as zeros.
    """
    # J^T u is linear in u, so its derivative by u along v is J v: two backward passes a product, over graphs that all
    # products share. Forward mode repeats the forward for each product, needs unfused attention as well, and took four
    # times as long. autograd.grad returns gradients without accumulating them, so ZeRO's hooks never run.
    weight = (1 / (std.square() * mean.numel())).view(-1, *[1] * (mean.dim() - 1))
    u = torch.zeros_like(mean, requires_grad=True)
    pulled = torch.autograd.grad(mean, parameters, u, create_graph=True, allow_unused=True)
    used = [index for index, gradient in enumerate(pulled) if gradient is not None]
    sizes = [parameter.numel() for parameter in parameters]

    def product(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split(sizes)
        tangents = [parts[index].view_as(pulled[index]) for index in used]
        (pushed,) = torch.autograd.grad([pulled[index] for index in used], u, tangents, retain_graph=True)
        return _flat_gradient(mean, parameters, weight * pushed)

    return product


class FisherProbe:
    """Estimates for one set of parameters.

    `vector`, unit [P], is the last eigenvector and the next start. It begins the same on all ranks, which must call
    `estimate` together, on equally many samples, with the same number of iterations.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], seed: int) -> None:
        self.parameters = list(parameters)
        count = sum(parameter.numel() for parameter in self.parameters)
        vector = torch.randn(count, generator=stream(seed))
        self.vector = (vector / vector.norm()).to(self.parameters[0].device)

    def estimate(
        self,
        mean: torch.Tensor,
        std: torch.Tensor,
        log_prob: torch.Tensor,
        iterations: int = 4,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> FisherEstimate:
        """Iterate powers from the last eigenvector, and compute the samples' scores one by one.

        mean [b, ...] and log_prob [b] come with their graphs, made under `probing`; std is [b]. `reduce` averages a
        flat tensor over ranks. The forward must call the module itself, not its DeepSpeed engine, which hooks its
        outputs.
        """
        product, largest = fisher_product(mean, std, self.parameters), 0.0
        for _ in range(iterations):
            image = product(self.vector)
            image = reduce(image) if reduce else image
            largest = float(image.norm())
            if 0 < largest < math.inf:  # otherwise H is zero or not finite, and any vector will do
                self.vector = image / largest
        scores = (_flat_gradient(one, self.parameters) for one in log_prob)
        return FisherEstimate(largest, max(float(score.norm()) for score in scores))


def _flat_gradient(
    outputs: torch.Tensor, parameters: Sequence[torch.nn.Parameter], weights: torch.Tensor | None = None
) -> torch.Tensor:
    gradients = torch.autograd.grad(
        outputs, parameters, weights, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.flatten() for gradient in gradients])
