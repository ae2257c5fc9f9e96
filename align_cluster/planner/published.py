"""Architectures of published pipelines, as their config.json files at the Hugging Face hub state them.

Copied in November 2026 from the hub ids named below (Stability AI, Black Forest Labs, CompVis and Runway, Qwen), by way
of mirrors of their config files, such as those in lllyasviel/stable-diffusion-webui-forge. Settings that are null, and
those that no shape depends on, are left out. Tests compare the totals with the published numbers of parameters.
"""

from typing import Any

Config = dict[str, Any]

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_CLIP = {"max_position_embeddings": 77, "vocab_size": 49408}
_TEXT_L: Config = _CLIP | _CLIP_L | {"projection_dim": 768, "hidden_act": "quick_gelu"}
_TEXT_G: Config = _CLIP | _CLIP_G | {"projection_dim": 1280, "hidden_act": "gelu"}
_TEXT_T5: Config = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_TEXT_QWEN: Config = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
    "tie_word_embeddings": False,
}


def _vae(**settings: Any) -> Config:
    """The autoencoder of Stable Diffusion, whose width all families kept."""
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
    } | settings


def _scheduler(**settings: Any) -> Config:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000} | settings


def _sd3(**transformer: Any) -> dict[str, Config]:
    return {
        "model_index.json": {
            "_class_name": "StableDiffusion3Pipeline",
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_3": ["transformers", "T5EncoderModel"],
        },
        "transformer": {
            "attention_head_dim": 64,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "qk_norm": "rms_norm",
            "sample_size": 128,
        }
        | transformer,
        "vae": _vae(
            latent_channels=16,
            sample_size=1024,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "text_encoder": _TEXT_L,
        "text_encoder_2": _TEXT_G,
        "text_encoder_3": _TEXT_T5,
        "scheduler": _scheduler(shift=3.0),
    }


def _flux(**transformer: Any) -> dict[str, Config]:
    return {
        "model_index.json": {
            "_class_name": "FluxPipeline",
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
        },
        "transformer": {
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "num_layers": 19,
            "num_single_layers": 38,
            "in_channels": 64,
            "patch_size": 1,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
        }
        | transformer,
        "vae": _vae(
            latent_channels=16,
            sample_size=1024,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "text_encoder": _TEXT_L,
        "text_encoder_2": _TEXT_T5,
        "scheduler": _scheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    }


_SD1: dict[str, Config] = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
    },
    "unet": {
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "sample_size": 64,
    },
    "vae": _vae(latent_channels=4, sample_size=512, scaling_factor=0.18215),
    "text_encoder": _TEXT_L,
    "scheduler": {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    },
}

_QWEN: dict[str, Config] = {
    "model_index.json": {
        "_class_name": "QwenImagePipeline",
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    },
    "transformer": {
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "num_layers": 60,
        "in_channels": 64,
        "out_channels": 16,
        "patch_size": 2,
        "joint_attention_dim": 3584,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": False,
    },
    "vae": {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
    },
    "text_encoder": _TEXT_QWEN,
    "scheduler": _scheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    ),
}

# Hub id -> part -> its settings.
PIPELINES: dict[str, dict[str, Config]] = {
    "stabilityai/stable-diffusion-3.5-medium": _sd3(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=list(range(13)),
    ),
    "stabilityai/stable-diffusion-3.5-large": _sd3(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192
    ),
    "black-forest-labs/FLUX.1-dev": _flux(guidance_embeds=True),
    "black-forest-labs/FLUX.1-schnell": _flux(guidance_embeds=False),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD1,
    "CompVis/stable-diffusion-v1-4": _SD1,
    "Qwen/Qwen-Image": _QWEN,
}
