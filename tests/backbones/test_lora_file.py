import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 8), (6, 1.5)])
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


@pytest.mark.parametrize("alpha", [8, 10])
def test_a_reader_without_metadata_or_alpha_adds_what_the_adapter_adds(tmp_path, alpha):
    """As older diffusers, ComfyUI and others do: a layer's weight plus B @ A."""
    backbone = SD3(SD3.Config(precision="fp32", lora={"rank": 4, "alpha": alpha}))
    ours = add_adapters(backbone, backbone.load_denoiser(), ("default",))
    held = load_file(backbone.save_lora(random_state(ours), tmp_path))
    layers = {name: layer for name, layer in ours.named_modules() if hasattr(layer, "base_layer")}
    for name, layer in layers.items():
        b, a = held.pop(f"transformer.{name}.lora_B.weight"), held.pop(f"transformer.{name}.lora_A.weight")
        torch.testing.assert_close(b @ a, layer.get_delta_weight("default"), rtol=0, atol=1e-5)
    assert layers and not held


def test_the_stock_pipeline_without_the_metadata_draws_the_same(tmp_path):
    backbone = SD3(SD3.Config(precision="fp32", lora={"rank": 4, "alpha": 8}))
    ours = add_adapters(backbone, backbone.load_denoiser(), ("default",))
    path = backbone.save_lora(random_state(ours), tmp_path)
    (tmp_path / "bare").mkdir()
    save_file(load_file(path), tmp_path / "bare" / path.name)
    drawn = []
    for folder in (tmp_path, tmp_path / "bare"):
        pipe = pipeline(backbone)
        pipe.load_lora_weights(folder)
        noise = initial_noise([torch.Generator().manual_seed(1)], backbone.latent_shape)
        arguments = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 0, "output_type": "np"}
        drawn.append(pipe(TEXT, latents=noise, **arguments).images)
    assert np.array_equal(*drawn)


def test_the_file_holds_the_adapter_alone_in_fp32_under_the_transformer_prefix(tmp_path, settings):
    from safetensors import safe_open

    backbone = SD3(settings)
    state = random_state(add_adapters(backbone, backbone.load_denoiser(), ("default", "old")))
    path = backbone.save_lora(state, tmp_path / "lora")
    assert path == tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {f"transformer.{name}" for name in state}
        for name, value in state.items():
            scale = np.float32(6 / 4 if ".lora_B." in name else 1)
            np.testing.assert_array_equal(file.get_tensor(f"transformer.{name}"), value * scale)
