"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): CLIP ViT-H/14 tuned on choices between two images."""

from typing import ClassVar, Literal

import torch

from align_cluster.rewards.base import EmbeddingReward, ModelSize, RewardSection
from align_cluster.rewards.clip import CLIP_MODEL, CLIPS, IMPORTS, PROCESSOR, Clip
from align_cluster.rewards.loading import model_size
from align_cluster.rewards.words import Vocabulary, transformers_vocabulary


class PickScore(EmbeddingReward):
    """Predicts human preference: PickScore's cosine times its learned temperature, about 100.

    It is 20 to 24 for generated images.
    """

    class Config(RewardSection):
        """Configures PickScore."""

        reads = {"path": CLIP_MODEL, "processor": PROCESSOR}
        kind: Literal["pickscore"] = "pickscore"
        path: str = "yuvalkirstain/PickScore_v1"
        """The model: a hub id or a folder."""
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        """The tokenizer and preprocessing: a hub id or a folder. The checkpoint is published without them, and the
        default is the one that its authors name."""
        scale: Literal["raw", "flow_grpo", "srpo", "cosine"] = "raw"
        """The unit of the score: `raw` is what tables print, about 20 to 24. `flow_grpo` is raw / 26, about 0.8 to
        0.95. `srpo` is raw / 20, about 1.1, and `cosine` leaves out the learned temperature, about 0.2, as DanceGRPO
        does."""

    imports: ClassVar[tuple[str, ...]] = IMPORTS

    @property
    def usual(self) -> float:
        """Return the low end of the settings' scale."""
        return {"raw": 20.0, "flow_grpo": 0.8, "srpo": 1.0, "cosine": 0.0}[self.config.scale]

    def vocabulary(self) -> Vocabulary | None:
        """Return the words of the processor's tokenizer."""
        return transformers_vocabulary(self.config.processor)

    def load(self, device: str, threads: int) -> None:
        """Load the model and the processor."""
        self.clip = Clip(self.config.kind, self.config.path, self.config.processor, device)
        raw = self.clip.model.logit_scale.exp().item()
        self.factor = {"raw": raw, "flow_grpo": raw / 26, "srpo": raw / 20, "cosine": 1.0}[self.config.scale]

    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images with the CLIP model."""
        return self.clip.see(images)

    def read(self, text: str) -> torch.Tensor:
        """Embed a text with the CLIP model."""
        return self.clip.read(text)

    def model_sizes(self) -> list[ModelSize | None]:
        """Return the size of the CLIP."""
        return [model_size(self.config.path, CLIPS)]
