"""What all clipped policy gradients over the stochastic steps of a rollout share."""

from abc import abstractmethod

import torch

from align_cluster.algorithms.base import KL, Algorithm, Batch, Policy
from align_cluster.algorithms.terms import clipped_surrogate, gaussian_kl
from align_cluster.types import Metric


class PolicyGradient(Algorithm):
    """One trained step an inner pass: the clipped surrogate of its ratio and, with `kl_beta`, the KL to the base model.

    A Config has clip, clip_high, kl_beta and kl_mode, which mean what they do in GRPO's.
    """

    needs_density = True
    default_step = "flow_sde"
    behaviour = "default"
    metrics = (
        Metric(
            "train/log_ratio_max",
            "nats/dim",
            "largest |log ratio| of the policy to the one that drew",
            reduce="largest",
            source="log_ratio",
        ),
        Metric("train/clip_high", "fraction", "share of ratios above the clip range"),
        Metric("train/clip_low", "fraction", "share of ratios below the clip range"),
        KL,
    )

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
        config, slot = self.config, batch.slots[batch.inner_pass]
        k, x, x_next = batch.indices[:, slot], batch.before[:, slot], batch.after[:, slot]
        sigma, high = policy.step.level(k), config.clip_high or config.clip
        mean, std, std_t = policy.step.mean(k, x, policy.velocity(x, sigma))
        log_ratio = policy.step.density(mean, std, x_next) - batch.log_probs[:, slot]
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
