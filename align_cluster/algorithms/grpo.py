"""Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): clipped policy gradient over a rollout's stochastic steps.

Its relatives share this loss. DanceGRPO, Flow-CPS and MixGRPO differ in kind of step, schedule and window, GRPO-Guard
in the ratio.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat

from align_cluster.algorithms.base import Batch
from align_cluster.algorithms.policy_gradient import PolicyGradient
from align_cluster.algorithms.terms import guarded_log_ratio
from align_cluster.rollouts.steps import STEPS
from align_cluster.settings import Root, Section


class GRPO(PolicyGradient):
    """Flow-GRPO, DanceGRPO, MixGRPO: every trained denoising step of a sample gets the sample's group advantage."""

    class Config(Section):
        """Configures GRPO."""

        kind: Literal["grpo"] = "grpo"
        clip: PositiveFloat = 1e-4
        """The distance from 1 at which ratios are clipped, below and, unless clip_high is set, above. Log-probs are
        means over latent dimensions, so it is tiny. Flow-GRPO and DanceGRPO use 1e-4, Flow-GRPO-Fast and Flow-CPS 1e-5,
        GRPO-Guard 2e-6; small latents need more."""
        clip_high: PositiveFloat | None = None
        """The distance above 1 at which ratios are clipped. Null takes `clip`."""
        advantage_clip: PositiveFloat = 5.0
        """The bound on |advantage| in the loss. Flow-GRPO and DanceGRPO use 5."""
        kl_beta: Annotated[float, Field(ge=0)] = 0.04
        """The weight of the KL from the base model in the loss; 0 saves its network pass. Flow-GRPO uses 0.04 for
        GenEval and OCR and 0.01 for PickScore on SD3.5 Medium, and 0 on FLUX; DanceGRPO uses 0."""
        kl_mode: Literal["no_dt", "exact_mean", "exact_sum"] = "no_dt"
        """How the KL is measured: as the mean over latent dimensions without the time step in the variance (`no_dt`,
        Flow-GRPO's convention), as the exact mean, or as the exact sum. The published values of kl_beta belong to
        `no_dt`."""
        ratio: Literal["plain", "guard"] = "plain"
        """Whether ratios are taken as they are, or normalised to one scale at all noise levels, as GRPO-Guard does.
        `guard` needs another `clip` and a step kind with a normalised density, which cps has not."""
        guard_weight: Literal["inverse_dt", "none"] = "inverse_dt"
        """Whether `ratio: guard` divides each step's loss by its length -dt, as the official code does for flow models,
        or not, as some re-implementations do. `ratio: plain` ignores it."""

        def problems(self, where: str, run: Root) -> Iterator[str]:
            """Refuse guarded ratios of a density that is not normalised."""
            if self.ratio == "guard" and not STEPS[run.step_kind.kind].normalised:
                able = [
                    kind
                    for kind, step in STEPS.items()
                    if step.has_density and step.normalised and run.prediction in step.predictions
                ]
                yield (
                    f"{where}.ratio is guard, which needs a normalised Gaussian density, and rollout.step.kind "
                    f"{run.step_kind.kind} has none; set rollout.step.kind to {' or '.join(able)}, or {where}.ratio to "
                    "plain"
                )

        def notes(self, where: str, run: Root) -> Iterator[str]:
            """Note plain ratios where noise and noise level vanish together."""
            if self.ratio == "plain" and STEPS[run.step_kind.kind].noise_vanishes and run.tiny_last_level:
                yield (
                    f"rollout.step.kind is {run.step_kind.kind}, whose noise vanishes at the small last levels of "
                    "SD3's schedule, and the gradient is largest there; rollout.schedule.kind linear or "
                    f"{where}.ratio guard learns better"
                )

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
