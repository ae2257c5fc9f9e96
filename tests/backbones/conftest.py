"""A random pipeline with every part of Stable Diffusion 3.5, T5 and dual attention included, of a test's size."""

from pathlib import Path

import pytest
import torch


def clip_tokenizer(folder: Path) -> object:
    """The real CLIP tokenizer class with a vocabulary of letters."""
    import json

    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def t5_tokenizer() -> object:
    """A fast tokenizer with T5's end token and padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "red", "circle", "two", "blue", "squares"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


@pytest.fixture(scope="session")
def sd35_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Stable Diffusion 3.5 pipeline, 64 x 64 pixels, written by stock diffusers."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("sd35")
    state = torch.get_rng_state()
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder)
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
    torch.set_rng_state(state)
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
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"
