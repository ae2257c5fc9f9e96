import numpy as np
import pytest
import torch

from align_cluster.backbones.flux import Flux
from align_cluster.backbones.pipeline import pack, unpack
from align_cluster.conditions.exploration import E2po
from align_cluster.conditions.perturb import render, tokenize
from align_cluster.rollouts.guidance import TextBatch

from . import tiny_flux
from .contract import TEXT, Case, noise_of, sample

SETTINGS = {"precision": "fp32", "height": 64, "width": 64, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def folder(tiny_pipeline):
    return tiny_pipeline("flux")


@pytest.fixture(scope="module")
def flux(folder):
    return Flux(Flux.Config(path=str(folder), **SETTINGS))


@pytest.fixture(scope="module")
def schnell_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux") / "schnell"
    tiny_flux.build(path, distilled=False)
    return path


def predict(backbone, denoiser, condition):
    text = TextBatch.build([condition], None, torch.device("cpu"))
    return backbone.velocity(denoiser, noise_of(backbone, (0,)), torch.tensor([0.5]), text.sequence, text.pooled)


def test_without_an_image_size_images_have_the_stock_pipelines_1024_pixels(folder):
    pipe = tiny_flux.stock(folder)
    latent = Flux(Flux.Config(path=str(folder))).latent_shape
    assert latent == (4, 128, 128) and pipe.default_sample_size == 128 and pipe.vae_scale_factor * 128 == 1024


def test_a_token_is_a_patch_of_two_by_two_with_the_channel_outermost():
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = latents.numpy().reshape(2, 3, 2, 2, 3, 2).transpose(0, 2, 4, 1, 3, 5).reshape(2, 6, 12)
    np.testing.assert_array_equal(pack(latents).numpy(), tokens)
    assert torch.equal(unpack(pack(latents), 4, 6), latents)


def test_the_guidance_that_dev_is_told_changes_its_velocity_and_schnell_is_told_none(folder, schnell_folder):
    changes = {}
    for name, path in (("dev", folder), ("schnell", schnell_folder)):
        weak, strong = (
            Flux(Flux.Config(path=str(path), distilled_guidance=guidance, **SETTINGS)) for guidance in (1.0, 3.5)
        )
        denoiser, (condition,) = weak.load_denoiser(), weak.encode([TEXT])
        changes[name] = (predict(weak, denoiser, condition) - predict(strong, denoiser, condition)).abs().max()
    assert changes["dev"] > 1e-3 and changes["schnell"] == 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_our_sample_of_schnell_is_the_stock_pipelines(schnell_folder, guidance):
    backbone, pipe = Case("flux", schnell_folder).backbone(), tiny_flux.stock(schnell_folder)
    pipe.set_progress_bar_config(disable=True)
    ours = sample(backbone, backbone.load_denoiser(), backbone.encode([TEXT, ""]), (1, 2), guidance)
    theirs = tiny_flux.draw(pipe, [TEXT] * 2, noise_of(backbone, (1, 2)), 4, guidance, "latent")
    np.testing.assert_allclose(backbone.sigmas(4), [1, 0.75, 0.5, 0.25, 0], atol=1e-12)
    np.testing.assert_allclose(tiny_flux.levels(pipe), backbone.sigmas(4), atol=1e-7)
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


def test_texts_have_512_tokens_for_dev_and_256_for_schnell_unless_the_settings_say_otherwise(folder, schnell_folder):
    lengths, keys = {}, set()
    for path, length in ((folder, None), (schnell_folder, None), (folder, 40)):
        (condition,) = Flux(Flux.Config(path=str(path), precision="fp32", max_sequence_length=length)).encode([TEXT])
        lengths[path, length] = len(condition.sequence)
        keys.add(condition.key)
    assert list(lengths.values()) == [512, 256, 40] and len(keys) == 3


def test_inserting_an_encoding_without_perturbation_gives_the_condition_bit_for_bit(flux):
    clip, config = flux._text, E2po(conditions=3)
    (ids,), _ = tokenize(clip.tokenizer, [TEXT])
    unperturbed = render(clip.text_encoder, "key", ids, torch.zeros(2, len(ids), 12), config)
    (condition,) = flux.encode([TEXT])
    for variant in (0, 1, 2):
        same = flux.insert(condition, unperturbed, variant)
        assert same.sequence.tobytes() == condition.sequence.tobytes()
        assert same.pooled.tobytes() == condition.pooled.tobytes()
    np.testing.assert_allclose(unperturbed.cosines, 1, atol=1e-12)


@pytest.mark.parametrize("embedding", ["projected", "pooled"])
def test_perturbations_spread_clip_ls_pooled_vector_and_change_nothing_else(flux, embedding):
    config = E2po(conditions=4, iterations=60, init=0.05, radius=0.5, lr=1e-2, embedding=embedding)
    (perturbation,) = flux.perturb([TEXT], config, 0)
    (condition,) = flux.encode([TEXT])
    assert flux.explorable and flux.insert(condition, perturbation, 0) is condition
    original = condition.pooled.copy()
    variants = [flux.insert(condition, perturbation, variant) for variant in (1, 2, 3)]
    assert len({one.key for one in (condition, *variants)}) == 4
    for variant, one in enumerate(variants):
        assert one.pooled.dtype == np.float32 and one.sequence.tobytes() == condition.sequence.tobytes()
        np.testing.assert_array_equal(one.pooled, perturbation.pooled[variant])
        assert (one.pooled != condition.pooled).all()
    np.testing.assert_array_equal(condition.pooled, original)
    # CLIP-L has no projection here: the vectors that the network gets are those whose cosines count.
    unit = np.stack([original, *perturbation.pooled]).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    np.testing.assert_allclose(perturbation.cosines, unit[1:] @ unit[0], atol=1e-6)
    (untrained,) = flux.perturb([TEXT], config.model_copy(update={"iterations": 1}), 0)
    assert perturbation.pairwise < untrained.pairwise - 0.05


def test_bf16_changes_a_velocity_by_rounding_only_and_answers_in_fp32(folder):
    # In bf16 the network rounds 1000 sigma and 1000 times the guidance; 500 and 2000 stay what they are.
    fine, coarse = (
        Flux(Flux.Config(path=str(folder), **SETTINGS | {"precision": precision, "distilled_guidance": 2.0}))
        for precision in ("fp32", "bf16")
    )
    denoiser, (condition,) = fine.load_denoiser(), fine.encode([TEXT])
    v, rounded = (predict(backbone, denoiser, condition) for backbone in (fine, coarse))
    assert rounded.dtype == torch.float32
    assert 0 < (v - rounded).abs().max() < 0.05 * v.abs().max()


def test_a_sampler_can_be_told_another_strength_of_guidance_than_the_settings(flux):
    denoiser, (condition,) = flux.load_denoiser(), flux.encode([TEXT])
    own = predict(flux, denoiser, condition)
    try:
        flux.distilled_guidance = flux.config.distilled_guidance
        assert torch.equal(predict(flux, denoiser, condition), own)
        flux.distilled_guidance = 0.0
        assert not torch.equal(predict(flux, denoiser, condition), own)
    finally:
        flux.distilled_guidance = None
