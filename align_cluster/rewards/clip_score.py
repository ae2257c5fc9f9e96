"""CLIP score (Hessel et al. 2021, arXiv 2104.08718): cosine of the image's and the prompt's CLIP embedding."""

from typing import Literal

import numpy as np
import torch

from align_cluster.embedded import pipeline_path
from align_cluster.rewards.base import Result, Reward, RewardSection
from align_cluster.types import Prompt, UserError


class ClipScore(Reward):
    """The plain cosine: about .24 to .30 for photographs and openai/clip-vit-large-patch14. Tables print 100 x."""

    class Config(RewardSection):
        """`path` is a hub id, a folder of a transformers CLIPModel with its processor, or "embedded"."""

        kind: Literal["clip_score"] = "clip_score"
        path: str = "embedded"

    def load(self, device: str, threads: int) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        embedded = self.config.path == "embedded"
        source = str(pipeline_path() / "clip") if embedded else self.config.path
        try:
            self.model = CLIPModel.from_pretrained(source, dtype=torch.float32).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            # The PIL backend resizes as the published scores were made, and needs no torchvision.
            self.processor = None if embedded else AutoImageProcessor.from_pretrained(source, backend="pil")
        except (OSError, ValueError) as error:
            raise UserError(
                f"rewards: clip_score cannot load {self.config.path!r}: give 'embedded', a hub id that this machine "
                "can reach, or a folder with a CLIPModel, its tokenizer and its preprocessor_config.json "
                f"({str(error).splitlines()[0]})"
            ) from error

    @torch.no_grad()
    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Result:
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))  # a chunk has one prompt: encode it once
        owner = torch.tensor([texts.index(prompt.text) for prompt in prompts])
        seen = self.model.get_image_features(pixel_values=self._pixels(images).to(self.model.device)).pooler_output
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        read = self.model.get_text_features(
            input_ids=ids["input_ids"].to(self.model.device), attention_mask=ids["attention_mask"].to(self.model.device)
        ).pooler_output
        cosine = torch.cosine_similarity(seen.cpu().double(), read.cpu().double()[owner])
        return Result(cosine.numpy(), np.ones(len(prompts), dtype=bool))

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        """Model input fp32 [B, 3, S, S] of images uint8 [B, H, W, 3]."""
        if self.processor is None:
            return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]
