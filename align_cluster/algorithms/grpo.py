"""Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): clipped policy gradient over a rollout's stochastic steps.

Its relatives share this loss. DanceGRPO, Flow-CPS and MixGRPO differ in kind of step, schedule and window, GRPO-Guard
in the ratio.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat

from align_cluster.algorithms.base import Batch
from align_cluster.algorithms.policy_gradient import PolicyGradient
from align_cluster.algorithms.terms import guarded_log_ratio
from align_cluster.settings import Section


class GRPO(PolicyGradient):
    """Every trained denoising step of a sample gets the sample's group advantage."""

    class Config(Section):
        """Configures GRPO.

        `clip` bounds the ratio below and, unless `clip_high` is set, above. `kl_mode` says what `kl_beta` multiplies;
        see `terms.gaussian_kl`. The published values use no_dt.

        `ratio: guard` normalises ratios as GRPO-Guard does, and needs other clip ranges. `guard_weight: inverse_dt`
        divides each step's loss by its -dt, as the official code does for flow models; some re-implementations leave
        that out.
        """

        kind: Literal["grpo"] = "grpo"
        clip: PositiveFloat = 1e-4
        clip_high: PositiveFloat | None = None
        advantage_clip: PositiveFloat = 5.0
        kl_beta: Annotated[float, Field(ge=0)] = 0.04
        kl_mode: Literal["no_dt", "exact_mean", "exact_sum"] = "no_dt"
        ratio: Literal["plain", "guard"] = "plain"
        guard_weight: Literal["inverse_dt", "none"] = "inverse_dt"

    adapters = ("default",)

    @property
    def needs_means(self) -> bool:
        """GRPO-Guard's ratio needs the means of the rollout."""
        return self.config.ratio == "guard"

    def advantage(self, batch: Batch, slot: int) -> torch.Tensor:
        """All steps of a sample have the same advantage."""
        return batch.advantages.clamp(-self.config.advantage_clip, self.config.advantage_clip)

    def ratio(
        self, batch: Batch, slot: int, mean: torch.Tensor, std: torch.Tensor, log_ratio: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """GRPO-Guard replaces the log-ratio and weighs each step by 1 / -dt."""
        if self.config.ratio == "plain":
            return log_ratio, 1.0
        log_ratio = guarded_log_ratio(batch.recorded.after[:, slot], mean, batch.recorded.means[:, slot], std)
        if self.config.guard_weight == "none":
            return log_ratio, 1.0
        # torch.tensor copies: sigmas may lie in read-only shared memory.
        k, levels = batch.recorded.indices[:, slot], torch.tensor(batch.sigmas, device=mean.device)
        return log_ratio, 1 / (levels[k] - levels[k + 1]).float()
