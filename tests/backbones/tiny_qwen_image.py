"""A random pipeline with every part of Qwen-Image, of a test's size."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .tokenizers import qwen_tokenizer

SETTINGS = {"height": 64, "width": 64, "max_sequence_length": 64}

# What the stock pipeline puts around a prompt, without the marks. It drops 34 tokens, which must be those before it.
WORDS = """system
Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects \
and background:user
assistant
a photo of a red circle two blue squares"""


def build(folder: Path) -> None:
    """Write a random Qwen-Image pipeline, 8 pixels a latent pixel, as stock diffusers does."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer(WORDS)
    sizes = {"hidden_size": 32, "intermediate_size": 40}
    text = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=sizes | text | {"rope_parameters": rope}, vision_config=sizes | vision)
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        num_res_blocks=1,
        latents_mean=[-0.7571, -0.7089, 0.9653, 1.5508],
        latents_std=[2.8184, 1.4541, 1.2196, 3.2687],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(  # the published one's settings
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    )
    pipe = QwenImagePipeline(scheduler, vae.eval(), encoder.eval(), tokenizer, transformer.eval())
    pipe.save_pretrained(folder)


def stock(folder: Path) -> Any:
    from diffusers import QwenImagePipeline

    return QwenImagePipeline.from_pretrained(folder, dtype=torch.float32)


def encoded(pipe: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of no prompt: a blank, as the model's authors have it."""
    sequence, mask = pipe.encode_prompt(text or " ", max_sequence_length=SETTINGS["max_sequence_length"])
    assert mask is None
    return sequence[0], torch.empty(0)


def draw(pipe: Any, texts: list[str], noise: torch.Tensor, steps: int, guidance: float, output: str) -> Any:
    height, width = (8 * side for side in noise.shape[2:])
    images = pipe(
        texts,
        negative_prompt=[" "] * len(texts) if guidance > 1 else None,
        true_cfg_scale=guidance,
        max_sequence_length=SETTINGS["max_sequence_length"],
        latents=pipe._pack_latents(noise, *noise.shape),
        height=height,
        width=width,
        num_inference_steps=steps,
        output_type=output,
    ).images
    return pipe._unpack_latents(images, height, width, 8)[:, :, 0] if output == "latent" else images


def levels(pipe: Any) -> np.ndarray:
    return pipe.scheduler.sigmas.numpy()
