"""CLIP score (Hessel et al. 2021, arXiv 2104.08718): cosine of the image's and the prompt's CLIP embedding."""

from typing import Literal

import torch

from align_cluster.embedded import pipeline_path
from align_cluster.rewards.base import DifferentiableReward, RewardSection
from align_cluster.rewards.clip import Clip
from align_cluster.types import Prompt


class ClipScore(DifferentiableReward):
    """The plain cosine: about .24 to .30 for photographs and openai/clip-vit-large-patch14. Tables print 100 x."""

    class Config(RewardSection):
        """`path` is a hub id, a folder of a transformers CLIPModel with its processor, or "embedded"."""

        kind: Literal["clip_score"] = "clip_score"
        path: str = "embedded"

    def load(self, device: str, threads: int) -> None:
        source = str(pipeline_path() / "clip") if self.config.path == "embedded" else self.config.path
        self.clip = Clip(self.config.kind, source, source, device)

    def differentiable(self, images: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        return self.clip.cosine(images, prompts)
