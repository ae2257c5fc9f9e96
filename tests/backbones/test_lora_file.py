import numpy as np
import pytest
import torch

from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.sd3 import SD3
from align_cluster.rollouts.denoise import denoise, initial_noise
from align_cluster.rollouts.guidance import TextBatch, guided_velocity
from align_cluster.rollouts.steps import Euler

TEXT = "a photo of a red circle"


def random_state(denoiser, scale=0.3):
    rng = np.random.default_rng(0)
    shapes = sorted((name, tuple(p.shape)) for name, p in adapter_parameters(denoiser, "default").items())
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes}


def pipeline(backbone):
    from diffusers import StableDiffusion3Pipeline

    without = {"text_encoder_3": None, "tokenizer_3": None} if backbone.config.path == "embedded" else {}
    pipe = StableDiffusion3Pipeline.from_pretrained(backbone.source, dtype=torch.float32, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 10), (6, 1.5)])
def test_the_stock_pipeline_loads_our_lora_file_and_draws_exactly_our_network(tmp_path, rank, alpha):
    backbone = SD3(SD3.Config(precision="fp32", lora={"rank": rank, "alpha": alpha}))
    ours = add_adapters(backbone, backbone.load_denoiser(), ("default",))
    state = random_state(ours)
    with torch.no_grad():
        for name, parameter in adapter_parameters(ours, "default").items():
            parameter.copy_(torch.from_numpy(state[name]))
    path = backbone.save_lora(state, tmp_path)
    pipe = pipeline(backbone)
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


def test_a_lora_of_sd35_with_dual_attention_makes_the_round_trip(tmp_path, sd35_folder):
    backbone = SD3(SD3.Config(path=str(sd35_folder), precision="fp32", lora={"rank": 3, "alpha": 5}))
    ours = add_adapters(backbone, backbone.load_denoiser(), ("default",))
    state = random_state(ours)
    with torch.no_grad():
        for name, parameter in adapter_parameters(ours, "default").items():
            parameter.copy_(torch.from_numpy(state[name]))
    pipe = pipeline(backbone)
    pipe.load_lora_weights(str(backbone.save_lora(state, tmp_path)))
    (condition,) = backbone.encode([TEXT])
    text, sigmas = TextBatch.build([condition], None, torch.device("cpu")), backbone.sigmas(3)
    drawn = [
        denoise(
            lambda x, sigma, net=net: guided_velocity(backbone, net, x, sigma, text),
            Euler(Euler.Config(), sigmas),
            backbone.latent_shape,
            (5,),
        ).x0
        for net in (ours, pipe.transformer, backbone.load_denoiser())
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-3)


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
