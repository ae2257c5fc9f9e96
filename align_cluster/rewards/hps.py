"""HPS v2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): CLIP ViT-H/14 tuned on people's preferences."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional as F

from align_cluster.rewards.base import EmbeddingReward, ModelSize, RewardSection
from align_cluster.rewards.clip import CLIP_H
from align_cluster.rewards.loading import extra, file_of, loading
from align_cluster.rewards.words import Vocabulary, open_clip_vocabulary
from align_cluster.settings import ModelSource

CHECKPOINT = "HPS_{version}_compressed.pt"  # file name at the hub


def squared(images: torch.Tensor, side: int) -> torch.Tensor:
    """Scale images [B, C, H, W] so that the longer side is `side`, in the middle of a black square.

    This is the official transform: bicubic with antialiasing, on floats and without clamping. The official one does not
    pad an image that is not square and already has `side` as its longer side, and the model would refuse it; this one
    does.
    """
    scale = side / max(images.shape[2:])
    height, width = (round(length * scale) for length in images.shape[2:])
    images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(images, (left, side - width - left, top, side - height - top))


class Hps(EmbeddingReward):
    """Predicts human preference: the cosine of the image's and the prompt's embedding by HPS, in fp32.

    It is about .20 to .37. Tables print 100 times that.
    """

    class Config(RewardSection):
        """Configures HPS."""

        reads = {
            "path": ModelSource(
                "a checkpoint, a folder with that of `version`, or an id such as xswu/HPSv2",
                (CHECKPOINT,),
                file=True,
            ),
            "model": ModelSource("a name that open_clip knows, or a json", None, file=True, ids=r"[^/]+(?<!\.json)"),
        }
        kind: Literal["hps"] = "hps"
        path: str = "xswu/HPSv2"
        """The checkpoint: a hub id, a folder with the checkpoint of `version` under its official name, or a file."""
        version: Literal["v2", "v2.1"] = "v2.1"
        """The published version, v2 or v2.1. Their weights and scales differ, so tables name theirs. DanceGRPO, SRPO
        and E2PO use v2.1."""
        model: str = "ViT-H-14"
        """The architecture of the checkpoint: a name that open_clip knows, or the path of a model-config json."""

    def vocabulary(self) -> Vocabulary | None:
        """Return the words of open_clip's tokenizer."""
        return open_clip_vocabulary()

    def load(self, device: str, threads: int) -> None:
        """Load the checkpoint into open_clip's architecture."""
        with extra(self.config.kind):
            import open_clip
        remedy = (
            "give a hub id that this machine can reach, a folder with "
            f"{CHECKPOINT.format(version=self.config.version)}, or such a file"
        )
        with loading(self.config.kind, f"{self.config.path!r} as {self.config.model!r}", remedy):
            architecture = self._architecture()
            weights = torch.load(self._checkpoint(), map_location="cpu", weights_only=True)["state_dict"]
            model = open_clip.CLIP(**architecture)
            model.load_state_dict(weights)  # fp16 on disk, fp32 from here on
        self.model = model.to(device).eval().requires_grad_(False)
        self.side = architecture["vision_cfg"]["image_size"]
        self.tokenizer = open_clip.SimpleTokenizer(context_length=architecture["text_cfg"]["context_length"])
        self.mean, self.std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )

    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images after the official transform."""
        pixels = (squared(images.to(self.mean.device, torch.float32), self.side) - self.mean) / self.std
        return self.model.encode_image(pixels)

    def read(self, text: str) -> torch.Tensor:
        """Embed a text with CLIP's own tokenizer."""
        return self.model.encode_text(self.tokenizer([text]).to(self.mean.device))[0]

    def model_sizes(self) -> list[ModelSize | None]:
        """Return the size of the CLIP, which is known for the published architecture."""
        return [CLIP_H if self.config.model == "ViT-H-14" else None]

    def _architecture(self) -> dict[str, Any]:
        import open_clip

        if self.config.model.endswith(".json"):
            return json.loads(Path(self.config.model).expanduser().read_text())
        architecture = open_clip.get_model_config(self.config.model)
        if architecture is None:
            raise ValueError(f"open_clip has no architecture {self.config.model!r}")
        return architecture

    def _checkpoint(self) -> Path:
        path = Path(self.config.path).expanduser()
        return path if path.is_file() else file_of(self.config.path, CHECKPOINT.format(version=self.config.version))
