"""Latent actor-critic PPO ("Explicit Critic Guidance", arXiv 2605.27736): credit for each denoising step from a critic
on noisy latents. Groups are not needed: one image a prompt will do."""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from align_cluster.algorithms.base import Algorithm, Batch, Policy
from align_cluster.algorithms.terms import clipped_surrogate, clipped_value_loss, gaussian_kl
from align_cluster.backbones.base import CRITIC, CriticSection
from align_cluster.config.base import Section


class WarmUp(Section):
    """At first only the critic learns: for `updates` updates of steps, or until it explains `explained_variance` of the
    rewards at noise levels below .5."""

    updates: Annotated[int, Field(ge=0)] = 30
    explained_variance: Annotated[float, Field(le=1)] = 0.3


class PPO(Algorithm):
    """The clipped surrogate with each step's own advantage, and a critic that regresses on returns."""

    class Config(Section):
        """`clip` bounds the ratio as in GRPO; `advantage_clip` the whitened advantages; `discount` and `decay` are
        GAE's.

        `value_clip` is how far a value may move in a step's updates before its loss stops paying for it, in units of
        the normalised reward. `critic_epochs` passes over the records train the critic for one of the actor.
        """

        kind: Literal["ppo"] = "ppo"
        clip: PositiveFloat = 1e-4
        clip_high: PositiveFloat | None = None
        advantage_clip: PositiveFloat = 5.0
        discount: Annotated[float, Field(gt=0, le=1)] = 1.0
        decay: Annotated[float, Field(ge=0, le=1)] = 0.95
        value_clip: PositiveFloat = 0.2
        kl_beta: Annotated[float, Field(ge=0)] = 0.0
        kl_mode: Literal["no_dt", "exact_mean", "exact_sum"] = "no_dt"
        critic: CriticSection = CriticSection()
        critic_lr: PositiveFloat = 1e-4
        critic_epochs: PositiveInt = 1
        warm_up: WarmUp = WarmUp()

    needs_density = True
    needs_path = True
    default_step = "flow_sde"
    behaviour = "default"

    @property
    def adapters(self) -> tuple[str, ...]:
        return ("default", CRITIC) if self.config.critic.features == "lora" else ("default",)

    @property
    def critic(self) -> CriticSection:
        return self.config.critic

    def turns(self, steps: int, recorded: int) -> int:
        return recorded

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, slot = self.config, batch.slots[batch.turn]
        k, x, x_next = batch.indices[:, slot], batch.before[:, slot], batch.after[:, slot]
        sigma = policy.step.level(k)
        mean, std, std_t = policy.step.mean(k, x, policy.velocity(x, sigma))
        log_ratio = policy.step.density(mean, std, x_next) - batch.log_probs[:, slot]
        high = config.clip_high or config.clip
        loss, ratio = clipped_surrogate(log_ratio, batch.advantages[:, slot], config.clip, high)
        metrics = {
            "log_ratio": log_ratio.detach(),
            "clip_high": (ratio.detach() > 1 + high).float(),
            "clip_low": (ratio.detach() < 1 - config.clip).float(),
        }
        if config.kl_beta:
            reference, _, _ = policy.step.mean(k, x, policy.velocity(x, sigma, None))
            kl = gaussian_kl(mean, reference, std, std_t, config.kl_mode)
            loss, metrics["kl"] = loss + config.kl_beta * kl, kl.detach()
        return loss, metrics

    def value_loss(self, values: torch.Tensor, batch: Batch, slot: int) -> torch.Tensor:
        """Loss [b] of the critic's values [b, R] at step `slot`; heads whose reward does not judge a sample count
        nothing."""
        returns, before = batch.returns[:, slot], batch.values[:, slot]
        judged = torch.isfinite(returns)
        loss = clipped_value_loss(values, before, torch.where(judged, returns, values.detach()), self.config.value_clip)
        return (loss * judged).sum(1) / judged.sum(1).clamp(min=1)
