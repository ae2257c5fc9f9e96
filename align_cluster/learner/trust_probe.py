"""Measures for SLAS's worst-case bound how far one update moved the policy, and what bounds that."""

import torch

from align_cluster.algorithms.base import Policy
from align_cluster.learner.fisher import FisherProbe, probing
from align_cluster.types import Record

PROBED = 4  # samples of each rank that the Fisher matrix is estimated on: a product costs two backward passes of each


class TrustProbe:
    """Looks at one update before and after, on a few samples of one denoising step. All ranks must call it together.

    The policy must call the network itself and not its DeepSpeed engine, because the engine hooks outputs.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], seed: int, world: int) -> None:
        self.parameters, self.world = parameters, world
        self.fisher = FisherProbe(parameters, seed)

    def begin(self, policy: Policy, record: Record, rows: slice, inner_pass: int) -> None:
        """Estimate, before the update, the Fisher matrix and the scores of members `rows` at trained step
        `inner_pass`.
        """
        arrays = (record.indices, record.before, record.after)
        self.policy = policy
        self.k, self.x, x_next = (
            torch.tensor(array[rows, inner_pass], device=self.parameters[0].device) for array in arrays
        )
        self.mean, self.std = self._step()
        log_prob = policy.step.density(self.mean, self.std, x_next)
        self.estimate = self.fisher.estimate(self.mean, self.std, log_prob, reduce=self._average)
        self.mean, self.start = self.mean.detach(), self._flat()

    def finish(self, gradient_norm: float) -> dict[str, float]:
        """Return, after the update, lengths and the KL per latent dimension by which it moved the policy."""
        with torch.no_grad():
            moved, _ = self._step()
        kl = ((moved - self.mean) ** 2).flatten(1).mean(1) / (2 * self.std**2)
        return {
            "lambda_max": self.estimate.lambda_max,
            "score_norm": self.estimate.score_norm,
            "gradient_norm": gradient_norm,
            "step_norm": float((self._flat() - self.start).norm()),
            "step_kl": float(kl.mean()),
        }

    def _step(self) -> tuple[torch.Tensor, torch.Tensor]:
        with probing():
            v = self.policy.velocity(self.x, self.policy.step.fed(self.k))
            mean, std, _ = self.policy.step.mean(self.k, self.x, v)
        return mean, std

    def _flat(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters])

    def _average(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor / self.world
