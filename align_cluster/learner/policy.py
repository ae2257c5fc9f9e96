"""The learner's network as algorithms see it."""

from dataclasses import dataclass

import torch

from align_cluster.algorithms.base import Policy
from align_cluster.backbones.adapters import active_adapter
from align_cluster.backbones.base import Backbone
from align_cluster.learner.reward_gradient import Judge
from align_cluster.rollouts.guidance import TextBatch, guided_velocity
from align_cluster.rollouts.steps import Step


@dataclass(frozen=True)
class LearnerPolicy(Policy):
    """One base with adapters behind a DeepSpeed engine, for one micro-batch's conditions and one rollout step kind.

    `network` is called, `denoiser` is the module below it whose adapters are switched. `judge` is there for algorithms
    that follow rewards' gradients.
    """

    backbone: Backbone
    network: torch.nn.Module
    denoiser: torch.nn.Module
    step: Step
    text: TextBatch
    guidance: float
    null_gradient: bool = False
    judge: Judge | None = None

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, adapter: str | None = "default") -> torch.Tensor:
        with torch.set_grad_enabled(adapter == "default"), active_adapter(self.denoiser, adapter):
            return guided_velocity(self.backbone, self.network, x, sigma, self.text, self.guidance, self.null_gradient)

    def rewards(self, latents: torch.Tensor, texts: list[str]) -> torch.Tensor:
        return self.judge(latents, texts)
