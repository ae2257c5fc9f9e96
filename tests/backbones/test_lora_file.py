import numpy as np
import pytest
import torch

from align_cluster.backbones.adapters import add_adapters
from align_cluster.backbones.attention import shorten_attention
from align_cluster.backbones.sd3 import SD3
from align_cluster.rollouts.denoise import initial_noise

from .contract import TEXT, random_state


def pipeline(backbone):
    from diffusers import StableDiffusion3Pipeline

    without = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(backbone.source, dtype=torch.float32, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 10), (6, 1.5)])
def test_the_stock_pipeline_loads_our_lora_file_and_draws_exactly_our_network(tmp_path, rank, alpha):
    backbone = SD3(SD3.Config(precision="fp32", lora={"rank": rank, "alpha": alpha}))
    ours = add_adapters(backbone, backbone.load_denoiser(), ("default",))
    path = backbone.save_lora(random_state(ours), tmp_path)
    pipe = pipeline(backbone)
    shorten_attention(pipe.transformer)  # as ours has it on a CPU; its rounding differs
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 0, "output_type": "np"}
    noise = initial_noise([torch.Generator().manual_seed(1)], backbone.latent_shape)
    base = pipe(TEXT, latents=noise.clone(), **arguments).images
    transformer = pipe.transformer
    pipe.transformer = ours
    expected = pipe(TEXT, latents=noise.clone(), **arguments).images
    pipe.transformer = transformer
    pipe.load_lora_weights(path.parent)
    loaded = pipe(TEXT, latents=noise.clone(), **arguments).images
    assert np.abs(loaded - expected).max() == 0
    assert np.abs(loaded - base).max() > 0.05


def test_the_file_holds_the_adapter_alone_in_fp32_under_the_transformer_prefix(tmp_path, settings):
    from safetensors import safe_open

    backbone = SD3(settings)
    state = random_state(add_adapters(backbone, backbone.load_denoiser(), ("default", "old")))
    path = backbone.save_lora(state, tmp_path / "lora")
    assert path == tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {f"transformer.{name}" for name in state}
        for name, value in state.items():
            np.testing.assert_array_equal(file.get_tensor(f"transformer.{name}"), value)
