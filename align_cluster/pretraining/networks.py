"""The networks and the tokenizer of the embedded pipeline, freshly initialised, and helpers of their training."""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, PreTrainedTokenizerFast

from align_cluster.embedded import scene
from align_cluster.embedded.render import SIZE
from align_cluster.files import atomic

LATENT_CHANNELS, WIDTH, LAYERS, HEADS = 8, 128, 5, 4
CLIP_TEXT, GUIDE_TEXT = (64, 2), (128, 3)  # (width, layers) of the two text encoders
MAX_LENGTH = 16  # the longest prompt has 13 words, plus begin and end
# The end id must not be 2: CLIPTextModel then takes a legacy path and pools at the largest id instead.
SPECIAL = ("<|pad|>", "<|unk|>", "<|startoftext|>", "<|endoftext|>")


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
    text = text_config(*CLIP_TEXT, vocab=len(new_tokenizer())).to_dict()
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


def vocabulary() -> dict[str, int]:
    """Return the map from token to id. The order is part of the shipped weights."""
    words = "a an photo picture drawing of and on light dark background small large sign that says".split()
    words += [*scene.NUMBERS.values(), "left", "right", "above", "below"]
    words += [*scene.SHAPES, *scene.PLURALS.values(), *scene.COLORS]
    words += [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", '"', ".", ",", "-"]
    return {word: index for index, word in enumerate((*SPECIAL, *words))}


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer with CLIP's conventions: begin and end tokens around the words, pad id 0.

    Words in upper case and numbers are split into letters and digits, one token each.
    """
    core = Tokenizer(models.WordLevel(vocabulary(), unk_token="<|unk|>"))
    pieces = pre_tokenizers.Split(Regex(r"[a-z]+|[A-Z]|[0-9]|[^\sA-Za-z0-9]"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pieces])
    core.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[(token, vocabulary()[token]) for token in SPECIAL[2:]],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|unk|>",
        pad_token="<|pad|>",
        model_max_length=MAX_LENGTH,
    )


def tokenize(prompts: list[str]) -> torch.Tensor:
    """Return token ids [B, 16] of prompts."""
    batch = new_tokenizer()(prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    return batch["input_ids"]


def all_prompts() -> list[str]:
    """Return the training prompts of all tasks, in a fixed order."""
    return [record["prompt"] for task in scene.TASKS for record in scene.prompts(task, "train")]


def save(value: object, path: Path) -> None:
    """Save `value` with torch.save, atomically."""
    with atomic(path) as temporary:
        torch.save(value, temporary)


def cosine(progress: float, flat: float = 0.0) -> float:
    """Return the learning-rate factor: 1 until `flat`, then a half cosine down to 2 %."""
    if progress < flat:
        return 1.0
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (progress - flat) / (1 - flat)))
