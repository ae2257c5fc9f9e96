"""Shared code of rewards on transformers' CLIPModel."""

from os.path import expanduser

import torch

from align_cluster.rewards.base import ModelSize
from align_cluster.rewards.heads import stretched
from align_cluster.rewards.loading import MODEL, loading
from align_cluster.settings import ModelSource

# Counted on the meta device as transformers builds them; they agree with open_clip's model_profile.csv. Activations are
# those of the image's tower in fp32, counted by align_cluster/planner/count.py.
CLIP_L = ModelSize(427.6e6, 162.0e9, 369e6)
CLIP_H = ModelSize(986.1e6, 334.6e9, 435e6)
IMPORTS = ("transformers:CLIPModel", "transformers:AutoTokenizer", "transformers:AutoImageProcessor")
CLIPS = {
    "openai/clip-vit-large-patch14": CLIP_L,
    "yuvalkirstain/PickScore_v1": CLIP_H,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": CLIP_H,
    "apple/DFN5B-CLIP-ViT-H-14-378": ModelSize(986.7e6, 1007.0e9, 1729e6),
    "google/siglip-so400m-patch14-384": ModelSize(428.2e6, 670.3e9, 913e6),
}

CLIP_MODEL = ModelSource("a folder with a transformers model, or an id such as openai/clip-vit-large-patch14", MODEL)
PROCESSOR = ModelSource("a folder with a tokenizer and a preprocessor_config.json, or a hub id")


class Clip:
    """Wraps a frozen CLIPModel in fp32, with its publishers' tokenizer and preprocessing.

    `model` and `processor` are hub ids or folders, and may be the same; `kind` is the reward's name for messages.
    Raises UserError if a part cannot be loaded, or if the preprocessing is not CLIP's.
    """

    def __init__(self, kind: str, model: str, processor: str, device: str) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        remedy = (
            "give hub ids that this machine can reach, or folders, of a CLIPModel and of a tokenizer with a "
            "preprocessor_config.json"
        )
        with loading(kind, f"{model!r} with the processor {processor!r}", remedy):
            model, processor = expanduser(model), expanduser(processor)
            loaded, report = CLIPModel.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
            if report["missing_keys"]:
                raise ValueError(f"the checkpoint has no {min(report['missing_keys'])}")
            self.tokenizer = AutoTokenizer.from_pretrained(processor)
            settings = AutoImageProcessor.from_pretrained(processor, backend="pil").to_dict()
            self.side = loaded.config.vision_config.image_size
            expected = {
                **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
                "size": {"shortest_edge": self.side},
                "crop_size": {"height": self.side, "width": self.side},
                "resample": 3,  # PIL's number for bicubic
            }
            for name, value in expected.items():
                if settings[name] != value:
                    raise ValueError(f"its images have {name} {settings[name]}, and CLIP's have {value}")
        self.model = loaded.to(device).eval().requires_grad_(False)
        self.mean, self.std = (
            torch.tensor(settings[name], device=device)[:, None, None] for name in ("image_mean", "image_std")
        )

    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings fp32 [B, D] of images [B, 3, H, W] in [0, 1], with a gradient to the pixels."""
        pixels = (self._cropped(images.to(self.mean.device, torch.float32)) - self.mean) / self.std
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def read(self, text: str) -> torch.Tensor:
        """Return the embedding fp32 [D] of a text."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([text], truncation=True, max_length=length, return_tensors="pt")
        ids, mask = (tokens[name].to(self.mean.device) for name in ("input_ids", "attention_mask"))
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output[0]

    def _cropped(self, images: torch.Tensor) -> torch.Tensor:
        """Scale the shorter side to the model's and return the middle square; odd margins round as in transformers."""
        height, width = (int(self.side * length / min(images.shape[2:])) for length in images.shape[2:])
        top, left = (height - self.side) // 2, (width - self.side) // 2
        return stretched(images, height, width)[:, :, top : top + self.side, left : left + self.side]
