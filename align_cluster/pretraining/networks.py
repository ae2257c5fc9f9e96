"""The networks of the embedded pipeline, freshly initialised, and helpers of their training."""

import math
import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from align_cluster.embedded import scene
from align_cluster.embedded.render import SIZE
from align_cluster.pretraining.tokenizer import MAX_LENGTH, build

LATENT_CHANNELS, WIDTH, LAYERS, HEADS = 8, 128, 5, 4
CLIP_TEXT, GUIDE_TEXT = (64, 2), (128, 3)  # (width, layers) of the two text encoders


def text_config(width: int, layers: int, vocab: int) -> CLIPTextConfig:
    """Return the configuration of a CLIP text encoder."""
    return CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=width,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )


def new_clip() -> CLIPModel:
    """Return a new CLIPModel: the reward model, and the frozen CLIP-L slot."""
    text = text_config(*CLIP_TEXT, vocab=len(build())).to_dict()
    vision = dict(
        hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE, patch_size=8
    )
    vision["projection_dim"] = CLIP_TEXT[0]
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=CLIP_TEXT[0]))


def new_vae() -> AutoencoderKL:
    """Return a new VAE with factor 4 and 8 channels."""
    vae = AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )
    with torch.no_grad():  # a posterior that starts narrow trains several times faster
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -5.0
        vae.encoder.conv_out.weight[LATENT_CHANNELS:] *= 0.1
    return vae


def new_dit() -> SD3Transformer2DModel:
    """Return a new SD3 denoiser."""
    joint = CLIP_TEXT[0] + GUIDE_TEXT[0]
    return SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=joint,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=joint,
        pos_embed_max_size=SIZE // 8,
        qk_norm="rms_norm",
    )


def tokenize(prompts: list[str]) -> torch.Tensor:
    """Return token ids [B, 16] of prompts."""
    batch = build()(prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    return batch["input_ids"]


def all_prompts() -> list[str]:
    """Return the training prompts of all tasks, in a fixed order."""
    return [record["prompt"] for task in scene.TASKS for record in scene.prompts(task, "train")]


def save(value: object, path: Path) -> None:
    """Save `value` with torch.save, atomically."""
    torch.save(value, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def cosine(progress: float, flat: float = 0.0) -> float:
    """Return the learning-rate factor: 1 until `flat`, then a half cosine down to 2 %."""
    if progress < flat:
        return 1.0
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (progress - flat) / (1 - flat)))
