"""A random pipeline with every part of FLUX.1-dev, or of schnell, of a test's size."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .tokenizers import clip_tokenizer, t5_tokenizer

SETTINGS = {"height": 64, "width": 64, "max_sequence_length": 16, "distilled_guidance": 2.5}


def build(folder: Path, distilled: bool = True) -> None:
    """Write a random FLUX.1 pipeline, 8 pixels a latent pixel, as stock diffusers does; schnell is not distilled for
    guidance."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer = clip_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=12, bos_token_id=52, eos_token_id=53, **sizes))
    t5 = T5EncoderModel(T5Config(vocab_size=11, d_model=40, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=12,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if distilled else 1.0, use_dynamic_shifting=distilled)
    pipe = FluxPipeline(scheduler, vae.eval(), clip.eval(), tokenizer, t5.eval(), t5_tokenizer(), transformer.eval())
    pipe.save_pretrained(folder)


def stock(folder: Path) -> Any:
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(folder, dtype=torch.float32)


def encoded(pipe: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    sequence, pooled, _ = pipe.encode_prompt(text, max_sequence_length=SETTINGS["max_sequence_length"])
    return sequence[0], pooled[0]


def draw(pipe: Any, texts: list[str], noise: torch.Tensor, steps: int, guidance: float, output: str) -> Any:
    height, width = (8 * side for side in noise.shape[2:])
    images = pipe(
        texts,
        negative_prompt=[""] * len(texts),
        true_cfg_scale=guidance,
        guidance_scale=SETTINGS["distilled_guidance"],
        max_sequence_length=SETTINGS["max_sequence_length"],
        latents=pipe._pack_latents(noise, *noise.shape),
        height=height,
        width=width,
        num_inference_steps=steps,
        output_type=output,
    ).images
    return pipe._unpack_latents(images, height, width, 8) if output == "latent" else images


def levels(pipe: Any) -> np.ndarray:
    return pipe.scheduler.sigmas.numpy()
