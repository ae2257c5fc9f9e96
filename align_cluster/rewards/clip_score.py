"""CLIP score (Hessel et al. 2021, arXiv 2104.08718): the cosine of the image's and the prompt's CLIP embedding."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch

from align_cluster.embedded import pipeline_path
from align_cluster.rewards.base import EmbeddingReward, ModelSize, RewardSection
from align_cluster.rewards.clip import CLIP_MODEL, CLIPS, IMPORTS, Clip
from align_cluster.rewards.loading import model_size
from align_cluster.rewards.words import Vocabulary, transformers_vocabulary


class ClipScore(EmbeddingReward):
    """Measures how well an image fits its prompt: the cosine of their CLIP embeddings.

    It is about .24 to .30 for photographs and openai/clip-vit-large-patch14. Tables print 100 times that.
    """

    class Config(RewardSection):
        """Configures the CLIP score."""

        reads = {"path": replace(CLIP_MODEL, give=f"embedded, {CLIP_MODEL.give}", words=("embedded",))}
        kind: Literal["clip_score"] = "clip_score"
        path: str = "embedded"
        """The CLIP model: a hub id, a folder of a transformers CLIPModel with its processor, or "embedded", which knows
        only the embedded world. Papers use openai/clip-vit-large-patch14 for photographs."""
        scale: Literal["cosine", "srpo"] = "cosine"
        """The unit of the score: `cosine` is the bare cosine. `srpo` multiplies it by a twentieth of the model's
        learned temperature, as SRPO's official code does to make it comparable to HPS."""

    imports: ClassVar[tuple[str, ...]] = IMPORTS

    @property
    def _source(self) -> str:
        return str(pipeline_path() / "clip") if self.config.path == "embedded" else self.config.path

    def vocabulary(self) -> Vocabulary | None:
        """Return the words of the model's tokenizer."""
        return transformers_vocabulary(self._source)

    def load(self, device: str, threads: int) -> None:
        """Load the CLIP model and its processor."""
        self.clip = Clip(self.config.kind, self._source, self._source, device)
        if self.config.scale == "srpo":
            self.factor = self.clip.model.logit_scale.exp().item() / 20

    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images with the CLIP model."""
        return self.clip.see(images)

    def read(self, text: str) -> torch.Tensor:
        """Embed a text with the CLIP model."""
        return self.clip.read(text)

    def model_sizes(self) -> list[ModelSize | None]:
        """Return the size of the CLIP."""
        return [model_size(self._source, CLIPS)]
