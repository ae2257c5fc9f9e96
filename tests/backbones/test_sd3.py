import shutil

import numpy as np
import pytest
import torch

from align_cluster.backbones.sd3 import SD3
from align_cluster.conditions.exploration import E2po
from align_cluster.conditions.perturb import render, tokenize
from align_cluster.errors import UserError
from align_cluster.rollouts.guidance import TextBatch

TEXTS = ["a photo of a red circle", "two blue squares"]


def stock_pipeline(folder, **parts):
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sd35(sd35_folder):
    return SD3(SD3.Config(path=str(sd35_folder), precision="fp32"))


@pytest.fixture(scope="module")
def stock35(sd35_folder):
    return stock_pipeline(sd35_folder)


def test_a_local_sd35_folder_has_its_own_shape_and_levels(sd35, stock35):
    assert sd35.latent_shape == (4, 8, 8)
    stock35.scheduler.set_timesteps(6)
    np.testing.assert_allclose(sd35.sigmas(6), stock35.scheduler.sigmas.numpy(), rtol=2e-6, atol=1e-7)


def test_without_t5_its_place_is_filled_as_the_stock_pipeline_does(sd35_folder):
    backbone = SD3(SD3.Config(path=str(sd35_folder), precision="fp32", t5=False))
    pipe = stock_pipeline(sd35_folder, text_encoder_3=None, tokenizer_3=None)
    (condition,) = backbone.encode(TEXTS[:1])
    sequence, _, pooled, _ = pipe.encode_prompt(TEXTS[0], None, None, max_sequence_length=128)
    np.testing.assert_array_equal(condition.sequence, sequence[0].detach().numpy())
    np.testing.assert_array_equal(condition.pooled, pooled[0].detach().numpy())
    assert np.abs(condition.sequence[77:]).max() == 0


def test_the_content_of_a_prompt_ends_at_the_first_end_token_where_that_is_the_padding_too(sd35):
    tokenizer = sd35._text.tokenizer
    ids, content = tokenize(tokenizer, ["abc de", "a" * 100])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and (ids[0] == tokenizer.eos_token_id).sum() == 77 - 6
    positions = [row.nonzero().flatten().tolist() for row in content]
    assert positions == [[1, 2, 3, 4, 5], list(range(1, 76))]


@pytest.mark.parametrize("pipeline", ["embedded", "sd35"])
def test_inserting_an_encoding_without_perturbation_gives_the_condition_bit_for_bit(pipeline, settings, sd35):
    backbone = sd35 if pipeline == "sd35" else SD3(settings)
    clip, config = backbone._text, E2po(conditions=3)
    (ids,), _ = tokenize(clip.tokenizer, TEXTS[:1])
    zeros = torch.zeros(2, len(ids), clip.text_encoder.config.hidden_size)
    unperturbed = render(clip.text_encoder, "key", ids, zeros, config)
    (condition,) = backbone.encode(TEXTS[:1])
    for variant in (0, 1, 2):
        same = backbone.insert(condition, unperturbed, variant)
        assert same.sequence.tobytes() == condition.sequence.tobytes()
        assert same.pooled.tobytes() == condition.pooled.tobytes()
    np.testing.assert_allclose(unperturbed.cosines, 1, atol=1e-12)


@pytest.mark.parametrize(("pipeline", "rows", "channels"), [("embedded", 16, 64), ("sd35", 77, 12)])
def test_a_perturbation_changes_clip_ls_slots_and_no_other(pipeline, rows, channels, settings, sd35):
    backbone = sd35 if pipeline == "sd35" else SD3(settings)
    (perturbation,) = backbone.perturb(TEXTS[:1], E2po(conditions=4, iterations=5, init=0.05), 0)
    (condition,) = backbone.encode(TEXTS[:1])
    assert backbone.explorable and backbone.insert(condition, perturbation, 0) is condition
    original = condition.sequence.copy(), condition.pooled.copy()
    variants = [backbone.insert(condition, perturbation, variant) for variant in (1, 2, 3)]
    assert len({one.key for one in (condition, *variants)}) == 4
    for variant, one in enumerate(variants):
        assert one.sequence.dtype == one.pooled.dtype == np.float32
        np.testing.assert_array_equal(one.sequence[:rows, :channels], perturbation.hidden[variant])
        np.testing.assert_array_equal(one.pooled[:channels], perturbation.pooled[variant])
        assert (one.sequence != condition.sequence)[1:rows, :channels].mean() > 0.5
        assert (one.pooled != condition.pooled)[:channels].all()
        assert one.sequence[rows:].tobytes() == condition.sequence[rows:].tobytes()
        assert one.sequence[:, channels:].tobytes() == condition.sequence[:, channels:].tobytes()
        assert one.pooled[channels:].tobytes() == condition.pooled[channels:].tobytes()
        # What precedes the first content token cannot know of it: attention is causal.
        np.testing.assert_array_equal(one.sequence[0], condition.sequence[0])
    np.testing.assert_array_equal(condition.sequence, original[0])
    np.testing.assert_array_equal(condition.pooled, original[1])


def test_another_image_size_gives_another_latent_shape(sd35_folder):
    backbone = SD3(SD3.Config(path=str(sd35_folder), precision="fp32", height=32, width=48))
    assert backbone.latent_shape == (4, 4, 6)
    latents = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    assert backbone.decode(latents).shape == (1, 32, 48, 3)


def test_bf16_changes_a_velocity_by_rounding_only_and_answers_in_fp32(settings):
    fine, coarse = SD3(settings), SD3(settings.model_copy(update={"precision": "bf16"}))
    denoiser = fine.load_denoiser()
    x = torch.randn(2, *fine.latent_shape, generator=torch.Generator().manual_seed(0))
    (condition,) = fine.encode(["a photo of a red circle"])
    text = TextBatch.build([condition] * 2, None, torch.device("cpu"))
    v, rounded = (b.velocity(denoiser, x, torch.full((2,), 0.6), text.sequence, text.pooled) for b in (fine, coarse))
    assert rounded.dtype == torch.float32
    assert 0 < (v - rounded).abs().max() < 0.05 * v.abs().max()


def test_images_are_rounded_not_truncated(settings):
    backbone = SD3(settings)
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    config = backbone._vae.config
    with torch.no_grad():
        pixels = backbone._vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample
    exact = (pixels.clamp(-1, 1) * 127.5 + 127.5).permute(0, 2, 3, 1).double().numpy()
    assert np.abs(backbone.decode(latents) - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("use", ["latent_shape", "sigmas", "load_denoiser", "encode", "decode"])
def test_a_path_without_a_pipeline_is_one_sentence_for_the_user(tmp_path, use):
    backbone = SD3(SD3.Config(path=str(tmp_path / "nowhere")))
    with pytest.raises(
        UserError, match="^backbone.path: '.*nowhere' has no readable 'model_index.json' part: give 'embedded'"
    ):
        if use == "latent_shape":
            _ = backbone.latent_shape
        else:
            argument = {"sigmas": 4, "encode": ["a"], "decode": torch.zeros(1, 4, 8, 8)}.get(use)
            getattr(backbone, use)(*[argument] if argument is not None else [])


@pytest.mark.parametrize(
    ("part", "use"), [("transformer", "load_denoiser"), ("vae", "_vae"), ("text_encoder", "_text")]
)
def test_a_part_whose_weights_are_missing_is_named(tmp_path, sd35_folder, part, use):
    folder = shutil.copytree(sd35_folder, tmp_path / "pipeline")
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    backbone = SD3(SD3.Config(path=str(folder)))
    with pytest.raises(UserError, match=f"has no readable '{part}' part"):
        value = getattr(backbone, use)
        value()
