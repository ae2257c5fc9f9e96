"""The learner's network as algorithms see it."""

import torch

from align_cluster.algorithms.base import Policy
from align_cluster.backbones.adapters import active_adapter
from align_cluster.backbones.base import Backbone
from align_cluster.rollouts.guidance import TextBatch, guided_velocity


class LearnerPolicy(Policy):
    """One base with adapters behind a DeepSpeed engine, for one micro-batch's conditions and one rollout step kind."""

    def __init__(
        self,
        backbone: Backbone,
        network: torch.nn.Module,
        denoiser: torch.nn.Module,
        step: object,
        text: TextBatch,
        guidance: float,
    ) -> None:
        self.backbone, self.network, self.denoiser = backbone, network, denoiser
        self.step, self.text, self.guidance = step, text, guidance

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, adapter: str | None = "default") -> torch.Tensor:
        with torch.set_grad_enabled(adapter == "default"), active_adapter(self.denoiser, adapter):
            return guided_velocity(self.backbone, self.network, x, sigma, self.text, self.guidance)

    def step_mean(self, k: int, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        return self.step.mean(k, x, v)

    def log_prob(self, k: int, x: torch.Tensor, v: torch.Tensor, x_next: torch.Tensor) -> torch.Tensor:
        return self.step.log_prob(k, x, v, x_next)
