"""A random pipeline with every part of Stable Diffusion 1.4, safety checker included, of a test's size."""

from pathlib import Path

import numpy as np
import torch

from .tokenizers import clip_tokenizer

# As in the model's repository; PNDMScheduler itself has no clip_sample.
SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def build(folder: Path) -> None:
    """Write a random Stable Diffusion 1.4 pipeline, 64 x 64 pixels, as stock diffusers does."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer()
    sizes = {"intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "bos_token_id": 52, "eos_token_id": 53, **sizes}
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    vision = {"hidden_size": 16, "image_size": 32, "patch_size": 16, **sizes}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    pipe = StableDiffusionPipeline(
        vae.eval(),
        CLIPTextModel(CLIPTextConfig(**text)).eval(),
        tokenizer,
        unet.eval(),
        PNDMScheduler.from_config(SCHEDULER),
        checker.eval(),
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    pipe.save_pretrained(folder)


def stock(folder: Path) -> object:
    """The pipeline with DDIM in PNDM's place, and without a safety checker, which would black random images out."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def encoded(pipe: object, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    sequence, _ = pipe.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)
    return sequence[0], torch.empty(0)


def draw(pipe: object, texts: list[str], noise: torch.Tensor, steps: int, guidance: float, output: str) -> object:
    height, width = (8 * side for side in noise.shape[2:])
    arguments = {"guidance_scale": guidance, "height": height, "width": width, "output_type": output}
    return pipe(texts, latents=noise, num_inference_steps=steps, **arguments).images


def levels(pipe: object) -> np.ndarray:
    timesteps = [*pipe.scheduler.timesteps.tolist(), 0]
    return (1 - pipe.scheduler.alphas_cumprod[timesteps].double()).sqrt().numpy()
