"""A random pipeline with every part of Stable Diffusion 3.5, T5 and dual attention included, of a test's size."""

from pathlib import Path

import numpy as np
import torch

from .tokenizers import clip_tokenizer, t5_tokenizer


def build(folder: Path) -> None:
    """Write a random Stable Diffusion 3.5 pipeline, 64 x 64 pixels, as stock diffusers does."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    tokenizer = clip_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=width, projection_dim=width, bos_token_id=52, eos_token_id=53, **sizes)
        )
        for width in (12, 20)
    ]
    t5 = T5EncoderModel(T5Config(vocab_size=11, d_model=40, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=40,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = StableDiffusion3Pipeline(
        transformer.eval(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae.eval(),
        clips[0].eval(),
        tokenizer,
        clips[1].eval(),
        tokenizer,
        t5.eval(),
        t5_tokenizer(),
    )
    pipe.save_pretrained(folder)


def stock(folder: Path) -> object:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(folder)


def encoded(pipe: object, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    sequence, _, pooled, _ = pipe.encode_prompt(
        text, None, None, do_classifier_free_guidance=False, max_sequence_length=128
    )
    return sequence[0], pooled[0]


def draw(pipe: object, texts: list[str], noise: torch.Tensor, steps: int, guidance: float, output: str) -> object:
    height, width = (8 * side for side in noise.shape[2:])
    arguments = {"guidance_scale": guidance, "height": height, "width": width, "output_type": output}
    return pipe(texts, latents=noise, num_inference_steps=steps, max_sequence_length=128, **arguments).images


def levels(pipe: object) -> np.ndarray:
    return pipe.scheduler.sigmas.numpy()
