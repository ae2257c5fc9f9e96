"""Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) and its relatives: clipped policy gradient over the stochastic steps of
a rollout. DanceGRPO, Flow-CPS and MixGRPO differ in step kind, schedule and window; GRPO-Guard in the ratio."""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat

from align_cluster.algorithms.base import Algorithm, Batch, Policy
from align_cluster.algorithms.terms import clipped_surrogate, gaussian_kl, guarded_log_ratio
from align_cluster.config.base import Section


class GRPO(Algorithm):
    """Every trained denoising step of a sample gets the sample's group advantage."""

    class Config(Section):
        """`clip` bounds the ratio below and, unless `clip_high` is set, above.

        `kl_mode` says what `kl_beta` multiplies; see `terms.gaussian_kl`. The published values use no_dt.
        `ratio: guard` normalises ratios as GRPO-Guard does; `guard_weight: inverse_dt` divides each step's loss by its
        -dt as the official code does for flow models (some re-implementations leave that out). Clip ranges must be
        tuned anew.
        """

        kind: Literal["grpo"] = "grpo"
        clip: PositiveFloat = 1e-4
        clip_high: PositiveFloat | None = None
        advantage_clip: PositiveFloat = 5.0
        kl_beta: Annotated[float, Field(ge=0)] = 0.04
        kl_mode: Literal["no_dt", "exact_mean", "exact_sum"] = "no_dt"
        ratio: Literal["plain", "guard"] = "plain"
        guard_weight: Literal["inverse_dt", "none"] = "inverse_dt"

    needs_density = True
    default_step = "flow_sde"
    behaviour = "default"
    adapters = ("default",)

    @property
    def needs_means(self) -> bool:
        return self.config.ratio == "guard"

    def turns(self, steps: int, recorded: int) -> int:
        return recorded

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, turn = self.config, batch.turn
        k, x, x_next = batch.indices[:, turn], batch.before[:, turn], batch.after[:, turn]
        sigma = policy.step.level(k)
        mean, std, std_t = policy.step.mean(k, x, policy.velocity(x, sigma))
        log_ratio = policy.step.density(mean, std, x_next) - batch.log_probs[:, turn]
        metrics = {"log_ratio": log_ratio.detach()}
        weight = 1.0
        if config.ratio == "guard":
            log_ratio = guarded_log_ratio(x_next, mean, batch.means[:, turn], std)
            if config.guard_weight == "inverse_dt":
                levels = torch.tensor(batch.sigmas, device=x.device)  # a copy: records may be read-only
                weight = 1 / (levels[k] - levels[k + 1]).float()
        advantage = batch.advantages.clamp(-config.advantage_clip, config.advantage_clip)
        loss, ratio = clipped_surrogate(log_ratio, advantage, config.clip, config.clip_high or config.clip)
        metrics["clip_high"] = (ratio.detach() > 1 + (config.clip_high or config.clip)).float()
        metrics["clip_low"] = (ratio.detach() < 1 - config.clip).float()
        loss = weight * loss
        if config.kl_beta:
            reference, _, _ = policy.step.mean(k, x, policy.velocity(x, sigma, None))
            kl = gaussian_kl(mean, reference, std, std_t, config.kl_mode)
            loss, metrics["kl"] = loss + config.kl_beta * kl, kl.detach()
        return loss, metrics
