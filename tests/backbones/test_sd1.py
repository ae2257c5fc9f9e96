import json
import shutil

import numpy as np
import pytest
import torch

from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.levels import ddim_timesteps
from align_cluster.backbones.sd1 import SD1
from align_cluster.conditions.exploration import E2po
from align_cluster.conditions.perturb import render, tokenize
from align_cluster.errors import UserError
from align_cluster.rollouts.steps import Euler

from .contract import TEXT, Case, noise_of, sample


@pytest.fixture(scope="module")
def folder(tiny_pipeline):
    return tiny_pipeline("sd1")


@pytest.fixture
def changed(folder, tmp_path):
    """Function (part, changes) -> a copy of the pipeline whose part has another config; None takes a setting out."""

    def copy(part, changes):
        (file,) = shutil.copytree(folder, tmp_path / "pipeline").glob(f"{part}/*config.json")
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
        return tmp_path / "pipeline"

    return copy


def backbone_at(folder):
    return SD1(SD1.Config(path=str(folder), precision="fp32", lora={"rank": 2}))


def test_every_noise_level_is_fed_as_the_timestep_that_has_it(folder):
    backbone = backbone_at(folder)
    for steps in (1, 10, 50, 999):
        step = Euler(Euler.Config(), backbone.sigmas(steps), backbone.prediction)
        fed = backbone.timesteps(step.fed(torch.arange(steps)))
        assert fed.dtype == torch.int64 and fed.tolist() == ddim_timesteps(steps).tolist()
    assert backbone.timesteps(backbone._levels).tolist() == list(range(1000))


def test_each_sample_of_a_batch_has_its_own_timestep(folder):
    backbone = backbone_at(folder)
    denoiser, (condition,) = backbone.load_denoiser(), backbone.encode([TEXT])
    x, sequence = noise_of(backbone, (0, 1)), torch.tensor(condition.sequence).repeat(2, 1, 1)
    sigma, nothing = backbone._levels[[981, 1]], torch.empty(2, 0)
    with torch.no_grad():
        output = backbone.velocity(denoiser, x, sigma, sequence, nothing)
        for row, timestep in enumerate((981, 1)):
            alone = denoiser(x[row : row + 1], timestep, sequence[:1]).sample
            torch.testing.assert_close(output[row : row + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize(
    ("changes", "prediction"),
    [
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "v"),  # Stable Diffusion 2.1
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "beta_end": 0.02}, "epsilon"),
        ({"num_train_timesteps": 400, "beta_start": None}, "epsilon"),
        ({"_class_name": "DDIMScheduler", "steps_offset": 0, "clip_sample": True}, "epsilon"),  # mended by both
    ],
    ids=["v", "another sampler", "another training", "outdated"],
)
def test_other_trainings_are_drawn_as_by_the_stock_pipeline_with_ddim(changed, changes, prediction):
    case = Case("sd1", changed("scheduler", changes))
    backbone, pipe = case.backbone(), case.pipe()
    assert backbone.prediction == prediction
    noise, conditions = noise_of(backbone, (0, 1)), backbone.encode([TEXT, ""])
    ours = sample(backbone, backbone.load_denoiser(), conditions, (0, 1), 2.0)
    theirs = case.tiny.draw(pipe, [TEXT] * 2, noise.clone(), 4, 2.0, "latent")
    np.testing.assert_allclose(backbone.sigmas(4), case.tiny.levels(pipe), rtol=2e-6, atol=1e-6)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("setting", "value", "known"),
    [
        ("prediction_type", "sample", "epsilon and v_prediction"),
        ("beta_schedule", "linear", "scaled_linear"),
        ("beta_schedule", None, "scaled_linear"),
        ("trained_betas", [0.1] * 1000, "None"),
        ("rescale_betas_zero_snr", True, "False"),
        ("timestep_spacing", "trailing", "leading"),
        ("thresholding", True, "False"),
    ],
)
def test_a_training_that_is_not_known_is_one_sentence(changed, setting, value, known):
    backbone = backbone_at(changed("scheduler", {setting: value}))
    sentence = f"has {setting} .{{1,30}}, and backbone.kind sd1 knows {known} only; give another model$"
    with pytest.raises(UserError, match=sentence):
        backbone.sigmas(4)
    with pytest.raises(UserError, match=sentence):
        _ = backbone.prediction


def test_the_vae_of_an_old_folder_has_the_scale_that_its_config_leaves_out(folder, changed):
    old = backbone_at(changed("vae", {"scaling_factor": None, "shift_factor": None}))
    assert "scaling_factor" not in old.vae_config
    latents = noise_of(old, (0,))
    images = old.decode(latents)
    assert images.std() > 0 and np.array_equal(images, backbone_at(folder).decode(latents))


def test_a_side_of_8_pixels_times_an_odd_number_is_drawn_too(folder):
    config = SD1.Config(path=str(folder), precision="fp32", height=48, width=80)
    assert SD1(config).latent_shape == (4, 6, 10)  # the UNet halves them to 3 x 5, and then to 2 x 3
    assert SD1(config.model_copy(update={"width": 24})).latent_shape == (4, 6, 3)


def test_adapters_are_on_the_four_projections_of_every_attention(folder):
    from diffusers.models.attention_processor import Attention

    backbone = backbone_at(folder)
    denoiser = add_adapters(backbone, backbone.load_denoiser(), ("default",))
    attentions = [name for name, module in denoiser.named_modules() if isinstance(module, Attention)]
    expected = {f"{name}.{target}" for name in attentions for target in ("to_q", "to_k", "to_v", "to_out.0")}
    found = {name.rsplit(".lora_", 1)[0] for name in adapter_parameters(denoiser, "default")}
    assert found == expected and any("mid_block" in name for name in found)


def test_the_lora_file_has_the_unets_prefix_and_is_read_back_for_sampling(folder, tmp_path):
    from align_cluster.backbones.lora_file import read_lora

    backbone = SD1(SD1.Config(path=str(folder), lora={"rank": 3, "alpha": 5}))
    parameters = adapter_parameters(add_adapters(backbone, backbone.load_denoiser(), ("default",)), "default")
    state = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
    lora = read_lora(backbone.save_lora(state, tmp_path))
    assert (lora.rank, lora.alpha) == (3, 3) and lora.state.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(lora.state[name], value * np.float32(5 / 3 if ".lora_B." in name else 1))


def test_inserting_an_encoding_without_perturbation_gives_the_condition_bit_for_bit(folder):
    backbone = backbone_at(folder)
    clip, config = backbone._text, E2po(conditions=3)
    (ids,), _ = tokenize(clip.tokenizer, [TEXT])
    unperturbed = render(clip.text_encoder, "key", ids, torch.zeros(2, len(ids), 32), config, backbone.layer)
    (condition,) = backbone.encode([TEXT])
    for variant in (0, 1, 2):
        same = backbone.insert(condition, unperturbed, variant)
        assert same.sequence.tobytes() == condition.sequence.tobytes() and same.pooled.shape == (0,)
    np.testing.assert_allclose(unperturbed.cosines, 1, atol=1e-12)


def test_a_perturbation_changes_all_that_the_unet_sees_of_a_prompts_content(folder):
    backbone = backbone_at(folder)
    (perturbation,) = backbone.perturb([TEXT], E2po(conditions=3, iterations=5, init=0.05), 0)
    (condition,) = backbone.encode([TEXT])
    variants = [backbone.insert(condition, perturbation, variant) for variant in (1, 2)]
    assert len({one.key for one in (condition, *variants)}) == 3
    for one in variants:
        assert one.sequence.shape == condition.sequence.shape and one.sequence.dtype == np.float32
        # What precedes the first content token cannot know of it: attention is causal.
        np.testing.assert_array_equal(one.sequence[0], condition.sequence[0])
        assert (one.sequence != condition.sequence)[1:].mean() > 0.9
    assert not np.array_equal(variants[0].sequence, variants[1].sequence)
