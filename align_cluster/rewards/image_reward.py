"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP tuned on experts' preferences.

The text encoder attends to the image.
"""

import json
import re
from os.path import expanduser
from typing import Any, Literal

import torch
from torch import nn

from align_cluster.rewards.base import DifferentiableReward, ModelSize, RewardSection
from align_cluster.rewards.heads import CLIP_MEAN, CLIP_STD, cropped, linear_head
from align_cluster.rewards.loading import file_of, loading, model_size
from align_cluster.rewards.words import Vocabulary, transformers_vocabulary
from align_cluster.settings import HUB_ID, ModelSource
from align_cluster.types import Prompt

CHECKPOINT, TEXT_CONFIG = "ImageReward.pt", "med_config.json"  # file names at the hub
BERT_ID = rf"bert-[a-z-]+|{HUB_ID}"  # the hub's oldest models have no owner
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # mean and deviation of ImageReward-v1.0's raw scores
TOKENS = 35  # length of a tokenized prompt, [CLS] and [SEP] included
PUBLISHED = {"THUDM/ImageReward": ModelSize(446.0e6, 137.8e9, 241e6)}  # counted as the sizes in clip.py

# BLIP's repository builds on timm's ViT and an own BERT; transformers renamed the first and kept the second.
VISION = "blip.visual_encoder."
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)
TEXT = "blip.text_encoder."
TEXT_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
)
HEAD, HEAD_PLACES = "mlp.layers.", (0, 2, 4, 6, 7)


def part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the entries of a state dict below `prefix`, by the rest of their names. Raises ValueError without any."""
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"the checkpoint has no {prefix}*")
    return found


def vision_tower(weights: dict[str, torch.Tensor]) -> nn.Module:
    """Return transformers' BlipVisionModel with the weights of BLIP's `visual_encoder`; their shapes give its sizes."""
    from transformers import BlipVisionConfig, BlipVisionModel

    for pattern, name in VISION_NAMES:
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len({key.split(".")[2] for key in weights if key.startswith("encoder.layers.")}),
        num_attention_heads=width // 64,  # true of ViT-B and ViT-L
        patch_size=patch,
        image_size=patch * round((weights["embeddings.position_embedding"].shape[1] - 1) ** 0.5),
        layer_norm_eps=1e-6,  # BLIP's, where transformers' default is 1e-5
    )
    tower = BlipVisionModel(config)
    tower.load_state_dict(weights)
    return tower


def text_tower(weights: dict[str, torch.Tensor], settings: dict[str, Any], vision_width: int) -> nn.Module:
    """Return transformers' BlipTextModel with the weights of BLIP's `text_encoder`; `settings` come from its json."""
    from transformers import BlipTextConfig, BlipTextModel

    config = BlipTextConfig(
        **{name: settings[name] for name in TEXT_SETTINGS},
        encoder_hidden_size=vision_width,
        is_decoder=True,  # gives the layers their cross-attention; self-attention stays bidirectional
    )
    tower = BlipTextModel(config, add_pooling_layer=False)
    tower.load_state_dict({key: value for key, value in weights.items() if key != "embeddings.position_ids"})
    return tower


class ImageReward(DifferentiableReward):
    """Predicts human preference from the image and its prompt, read together: about -2 to 2.

    The score is the head's value on the first token's state, shifted and scaled as v1.0's scores are.
    """

    class Config(RewardSection):
        """Configures ImageReward."""

        reads = {
            "path": ModelSource(
                f"a folder with {CHECKPOINT} and {TEXT_CONFIG}, or a hub id", (CHECKPOINT, TEXT_CONFIG)
            ),
            "tokenizer": ModelSource("a folder with BERT's tokenizer, or an id such as bert-base-uncased", ids=BERT_ID),
        }
        kind: Literal["image_reward"] = "image_reward"
        path: str = "THUDM/ImageReward"
        """The model: a hub id, or a folder with ImageReward.pt and med_config.json."""
        tokenizer: str = "bert-base-uncased"
        """The tokenizer of uncased BERT: a hub id or a folder."""

    def vocabulary(self) -> Vocabulary | None:
        """Return the words of BERT's tokenizer."""
        return transformers_vocabulary(self.config.tokenizer)

    def load(self, device: str, threads: int) -> None:
        """Load both towers, the head and the tokenizer."""
        from transformers import BertTokenizer

        what = f"{self.config.path!r} with the tokenizer {self.config.tokenizer!r}"
        remedy = f"give hub ids that this machine can reach, or folders, the first with {CHECKPOINT} and {TEXT_CONFIG}"
        with loading(self.config.kind, what, remedy):
            weights = torch.load(file_of(self.config.path, CHECKPOINT), map_location="cpu", weights_only=True)
            settings = json.loads(file_of(self.config.path, TEXT_CONFIG).read_text())
            vision = vision_tower(part(weights, VISION))
            text = text_tower(part(weights, TEXT), settings, vision.config.hidden_size)
            head = linear_head(text.config.hidden_size, HEAD_PLACES)
            head.load_state_dict(part(weights, HEAD))
            self.tokenizer = BertTokenizer.from_pretrained(expanduser(self.config.tokenizer))
            # BLIP's two own tokens. Scoring never adds them; a prompt that spells one out gets its id, as officially.
            self.tokenizer.add_special_tokens({"bos_token": "[DEC]"})
            self.tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
            if len(self.tokenizer) != text.config.vocab_size:
                raise ValueError(
                    f"{self.config.tokenizer!r} has {len(self.tokenizer)} tokens with BLIP's two, "
                    f"and the checkpoint {text.config.vocab_size}"
                )
        self.vision, self.text, self.head = (
            model.to(device).eval().requires_grad_(False) for model in (vision, text, head)
        )
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))

    def differentiable(self, images: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        """Return scores fp32 [B] of images [B, 3, H, W] in [0, 1], with a gradient to the pixels only.

        Image i meets prompt i only; the official `inference_rank` scores every image against every prompt.
        """
        device = self.mean.device
        texts = [prompt.text for prompt in prompts]
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        with torch.autocast(device.type, enabled=False):
            pixels = (cropped(images.to(device, torch.float32), self.vision.config.image_size) - self.mean) / self.std
            states = self.text(
                input_ids=tokens["input_ids"].to(device),
                attention_mask=tokens["attention_mask"].to(device),
                encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
            ).last_hidden_state
            return (self.head(states[:, 0]).squeeze(-1) - MEAN) / STD

    def model_sizes(self) -> list[ModelSize | None]:
        """Return the size of the BLIP."""
        return [model_size(self.config.path, PUBLISHED)]
