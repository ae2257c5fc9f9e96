"""Aesthetic scores: a linear head, fit to people's ratings, on an image's embedding. The prompt plays no part.

v1    github.com/christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE, on CLIP ViT-L/14
v2.5  github.com/discus0434/aesthetic-predictor-v2-5, on SigLIP so400m-patch14-384
"""

from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional as F

from align_cluster.rewards.base import DifferentiableReward, ModelSize, RewardSection
from align_cluster.rewards.clip import CLIPS
from align_cluster.rewards.heads import CLIP_MEAN, CLIP_STD, cropped, linear_head, stretched
from align_cluster.rewards.loading import MODEL, loading, model_size
from align_cluster.settings import HUB_ID, ModelSource
from align_cluster.types import Prompt


@dataclass(frozen=True)
class Published:
    """Names the sources of a published version: encoder, head, the head's layers, and the normalisation.

    `prefix` and `places` name the linear layers in the head's state dict.
    """

    encoder: str
    head: str
    prefix: str
    places: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


VERSIONS = {
    "v1": Published(
        encoder="openai/clip-vit-large-patch14",
        head="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        prefix="layers.",
        places=(0, 2, 4, 6, 7),
        mean=CLIP_MEAN,
        std=CLIP_STD,
    ),
    "v2.5": Published(
        encoder="google/siglip-so400m-patch14-384",
        head="https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth",
        prefix="scoring_head.",
        places=(0, 2, 4, 6, 8),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
}


class Aesthetic(DifferentiableReward):
    """Rates an image on a scale of 1 to 10, whatever the prompt: about 4 to 7 (v1), 5 to 6.6 (v2.5), in fp32."""

    reads_text = False

    class Config(RewardSection):
        """Configures aesthetic scores."""

        reads = {
            "encoder": ModelSource("a folder with the encoder of `version`, or a hub id", MODEL),
            "head": ModelSource(
                "a .pth file, an address, or owner/repository/file", None, True, rf"{HUB_ID}/.+|.+://.+"
            ),
        }
        kind: Literal["aesthetic"] = "aesthetic"
        version: Literal["v1", "v2.5"] = "v2.5"
        """The published predictor: v1 is LAION's on CLIP ViT-L/14, and v2.5 is Aesthetic Predictor v2.5 on SigLIP.
        Their scales differ; E2PO reports v2.5. The weights of v2.5 are under AGPL-3.0."""
        encoder: str | None = None
        """The image encoder: a hub id, or a folder of a transformers CLIPModel (v1) or SiglipModel (v2.5). null takes
        the published one of `version` from the hub."""
        head: str | None = None
        """The published .pth of the linear head: a file, an address, or owner/repository/file at the hub. null
        downloads that of `version`."""

    @property
    def usual(self) -> float:
        """Return the low end of its scale."""
        return 4.0

    def load(self, device: str, threads: int) -> None:
        """Load the encoder and the head."""
        self.published = VERSIONS[self.config.version]
        encoder, head = self.config.encoder or self.published.encoder, self.config.head or self.published.head
        what = f"the encoder {encoder!r} with the head {head!r}"
        remedy = "give hub ids or addresses that this machine can reach, or a folder and a file"
        with loading(f"aesthetic {self.config.version}", what, remedy):
            self.encoder = self._encoder(encoder).to(device).eval().requires_grad_(False)
            weights = {name.removeprefix(self.published.prefix): value for name, value in head_weights(head).items()}
            self.head = linear_head(self._width(), self.published.places)
            self.head.load_state_dict(weights)
        self.head = self.head.to(device).eval().requires_grad_(False)
        self.mean, self.std = (
            torch.tensor(values, device=device)[:, None, None] for values in (self.published.mean, self.published.std)
        )

    def differentiable(self, images: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        """Return scores fp32 [B] of images [B, 3, H, W] in [0, 1], with a gradient to the pixels only."""
        with torch.autocast(self.mean.device.type, enabled=False):
            images = images.to(self.mean.device, torch.float32)
            return self.head(F.normalize(self._embed(images), dim=-1)).squeeze(-1)

    def model_sizes(self) -> list[ModelSize | None]:
        """Return the size of the encoder; the head is small."""
        return [model_size(self.config.encoder or VERSIONS[self.config.version].encoder, CLIPS)]

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return the encoder's embeddings [B, width] of images fp32 [B, 3, H, W] on its device."""
        side = self.encoder.config.image_size
        if self.config.version == "v1":
            return self.encoder(pixel_values=(cropped(images, side) - self.mean) / self.std).image_embeds
        return self.encoder(pixel_values=(stretched(images, side, side) - self.mean) / self.std).pooler_output

    def _width(self) -> int:
        config = self.encoder.config
        return config.projection_dim if self.config.version == "v1" else config.hidden_size

    def _encoder(self, source: str) -> torch.nn.Module:
        from transformers import CLIPVisionModelWithProjection, SiglipVisionModel

        tower = CLIPVisionModelWithProjection if self.config.version == "v1" else SiglipVisionModel
        tower._keys_to_ignore_on_load_unexpected = [r"^text_", r"^logit_"]  # the text half is left out on purpose
        model, report = tower.from_pretrained(expanduser(source), dtype=torch.float32, output_loading_info=True)
        if report["missing_keys"]:  # transformers would draw these weights at random, without an error
            raise ValueError(f"the encoder's weights are missing, such as {min(report['missing_keys'])}")
        return model


def head_weights(source: str) -> dict[str, Any]:
    """Return the state dict at `source`: a file, an address (cached by torch), or owner/repository/file at the hub."""
    path = Path(source).expanduser()
    if "://" in source:
        return torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
    if not path.exists() and source.count("/") >= 2 and not path.is_absolute():
        from huggingface_hub import hf_hub_download

        owner, repository, file = source.split("/", 2)
        path = hf_hub_download(f"{owner}/{repository}", file)
    return torch.load(path, map_location="cpu", weights_only=True)
