"""What all clipped policy gradients over the stochastic steps of a rollout share."""

from abc import abstractmethod

import torch

from align_cluster.algorithms.base import Algorithm, Batch, Policy
from align_cluster.algorithms.terms import clipped_surrogate, gaussian_kl


class PolicyGradient(Algorithm):
    """One trained step an inner pass: the clipped surrogate of its ratio and, with `kl_beta`, the KL to the base model.

    A Config has clip, clip_high, kl_beta and kl_mode, which mean what they do in GRPO's.
    """

    needs_density = True
    default_step = "flow_sde"
    behaviour = "default"

    def inner_passes(self, steps: int, recorded: int) -> int:
        return recorded

    @abstractmethod
    def advantage(self, batch: Batch, slot: int) -> torch.Tensor:
        """Advantages [b] of the recorded step `slot`."""

    def ratio(
        self, batch: Batch, slot: int, mean: torch.Tensor, std: torch.Tensor, log_ratio: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """The log-ratio [b] that is clipped, and what its loss is weighed with."""
        return log_ratio, 1.0

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, recorded = self.config, batch.recorded
        slot = recorded.slots[batch.inner_pass]
        k, x, x_next = recorded.indices[:, slot], recorded.before[:, slot], recorded.after[:, slot]
        sigma, high = policy.step.level(k), config.clip_high or config.clip
        mean, std, std_t = policy.step.mean(k, x, policy.velocity(x, sigma))
        log_ratio = policy.step.density(mean, std, x_next) - recorded.log_probs[:, slot]
        clipped, weight = self.ratio(batch, slot, mean, std, log_ratio)
        loss, ratio = clipped_surrogate(clipped, self.advantage(batch, slot), config.clip, high)
        metrics = {
            "log_ratio": log_ratio.detach(),
            "clip_high": (ratio.detach() > 1 + high).float(),
            "clip_low": (ratio.detach() < 1 - config.clip).float(),
        }
        loss = weight * loss
        if config.kl_beta:
            reference, _, _ = policy.step.mean(k, x, policy.velocity(x, sigma, None))
            kl = gaussian_kl(mean, reference, std, std_t, config.kl_mode)
            loss, metrics["kl"] = loss + config.kl_beta * kl, kl.detach()
        return loss, metrics
