"""CLIP score with any model of open_clip, such as DFN (Fang et al. 2023, arXiv 2309.17425)."""

from typing import Literal

import torch

from align_cluster.errors import UserError
from align_cluster.rewards.base import EmbeddingReward, ModelSize, RewardSection
from align_cluster.rewards.clip import CLIPS
from align_cluster.rewards.loading import OPEN_CLIP, model_size, open_clip_model
from align_cluster.rewards.words import Vocabulary, open_clip_vocabulary


class OpenClipScore(EmbeddingReward):
    """Measures how well an image fits its prompt: the cosine of their embeddings by a model of open_clip.

    It is about .35 to .45 for the default model.
    """

    class Config(RewardSection):
        """Configures the CLIP score of an open_clip model."""

        reads = {"path": OPEN_CLIP}
        kind: Literal["open_clip_score"] = "open_clip_score"
        path: str = "apple/DFN5B-CLIP-ViT-H-14-378"
        """The model: a hub id, or a folder with open_clip_config.json and open_clip_pytorch_model.bin (or
        open_clip_model.safetensors). The default is the DFN model of DanceGRPO and MixGRPO."""

    def vocabulary(self) -> Vocabulary | None:
        """Return the words of open_clip's tokenizer."""
        return open_clip_vocabulary()

    def load(self, device: str, threads: int) -> None:
        """Load the model. Raises UserError if its transform pads images."""
        model, transform, self.tokenizer = open_clip_model(self.config.kind, "path", self.config.path)
        from open_clip.transform import ResizeKeepRatio

        *self.shaping, self.normalise = transform.transforms
        if any(isinstance(step, ResizeKeepRatio) for step in self.shaping):
            raise UserError(
                f"rewards: open_clip_score cannot use {self.config.path!r}: its images are padded or not square, and "
                "here they are scaled to a square or cropped; give another as path"
            )
        self.model, self.device = model.to(device).eval().requires_grad_(False), torch.device(device)

    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Apply the checkpoint's own transform to floats, and not to PIL's bytes, and embed the images."""
        images = images.to(self.device, torch.float32)
        for step in self.shaping:
            images = step(images)
        return self.model.encode_image(self.normalise(images.clamp(0, 1)))  # PIL's bytes cut off bicubic's overshoots

    def read(self, text: str) -> torch.Tensor:
        """Embed a text with the model."""
        return self.model.encode_text(self.tokenizer([text]).to(self.device))[0]

    def model_sizes(self) -> list[ModelSize | None]:
        """Return the size of the CLIP."""
        return [model_size(self.config.path, CLIPS)]
