"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): CLIP ViT-H/14 tuned on choices between two images."""

from typing import Literal

import torch

from align_cluster.rewards.base import DifferentiableReward, RewardSection
from align_cluster.rewards.clip import Clip
from align_cluster.types import Prompt


class PickScore(DifferentiableReward):
    """Cosine times the model's learned temperature, about 100: 20 to 24 for generated images."""

    class Config(RewardSection):
        """`path` and `processor` are hub ids or folders; the checkpoint is published without a processor of its own.

        `scale` is raw (as tables print it), flow_grpo (raw / 26: about .8 to .95) or cosine (no temperature, about .2).
        """

        kind: Literal["pickscore"] = "pickscore"
        path: str = "yuvalkirstain/PickScore_v1"
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        scale: Literal["raw", "flow_grpo", "cosine"] = "raw"

    def load(self, device: str, threads: int) -> None:
        self.clip = Clip(self.config.kind, self.config.path, self.config.processor, device)
        raw = self.clip.model.logit_scale.exp().item()
        self.factor = {"raw": raw, "flow_grpo": raw / 26, "cosine": 1.0}[self.config.scale]

    def differentiable(self, images: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        return self.factor * self.clip.cosine(images, prompts)
