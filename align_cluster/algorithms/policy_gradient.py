"""Shared code of all clipped policy gradients over the stochastic steps of a rollout."""

from abc import abstractmethod

import torch

from align_cluster.algorithms.base import KL, Algorithm, Batch, Policy
from align_cluster.algorithms.terms import clipped_surrogate, gaussian_kl
from align_cluster.types import Metric


class PolicyGradient(Algorithm):
    """Each inner pass trains one step: the clipped surrogate of its ratio plus, with `kl_beta`, the KL to the base.

    A Config has clip, clip_high, kl_beta and kl_mode, with the meaning that GRPO gives them.
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
        """Each inner pass trains one recorded step."""
        return recorded

    @abstractmethod
    def advantage(self, batch: Batch, slot: int) -> torch.Tensor:
        """Return the advantages [b] of the recorded step `slot`."""

    def ratio(
        self, batch: Batch, slot: int, mean: torch.Tensor, std: torch.Tensor, log_ratio: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return the log-ratio [b] to clip, and the weight of its loss."""
        return log_ratio, 1.0

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss is the clipped surrogate of one recorded step, plus the KL."""
        config, recorded = self.config, batch.recorded
        slot = recorded.slots[batch.inner_pass]
        k, x, x_next = recorded.indices[:, slot], recorded.before[:, slot], recorded.after[:, slot]
        sigma, high = policy.step.fed(k), config.clip_high or config.clip
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
