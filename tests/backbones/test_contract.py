"""What every backbone promises, against the stock pipeline of its family; contract.py says what a family adds."""

import json
import shutil

import numpy as np
import pytest
import torch

from align_cluster.backbones import BACKBONES
from align_cluster.backbones.adapters import add_adapters
from align_cluster.backbones.attention import shorten_attention
from align_cluster.conditions.exploration import E2po
from align_cluster.conditions.precision import to_tensor
from align_cluster.errors import UserError
from align_cluster.rollouts.guidance import TextBatch

from .contract import TEXT, Case, noise_of, random_state, sample

LONG = " ".join(["two blue squares"] * 40)


@pytest.fixture(scope="module", params=BACKBONES)
def case(request, tiny_pipeline):
    return Case(request.param, tiny_pipeline(request.param))


@pytest.fixture(scope="module")
def backbone(case):
    return case.backbone()


@pytest.fixture(scope="module")
def pipe(case):
    return case.pipe()


@pytest.mark.parametrize("text", [TEXT, "", LONG], ids=["usual", "empty", "too long"])
def test_prompts_are_encoded_as_the_stock_pipeline_does(case, backbone, pipe, text):
    (condition,) = backbone.encode([text])
    with torch.no_grad():  # some attention kernels are others where gradients are possible
        sequence, pooled = case.tiny.encoded(pipe, text)
    assert condition.sequence.dtype == condition.pooled.dtype == np.float32
    np.testing.assert_array_equal(condition.sequence, sequence.numpy())
    np.testing.assert_array_equal(condition.pooled, pooled.numpy())


@pytest.mark.parametrize("place", ["cpu", pytest.param("keep", marks=pytest.mark.gpu)])
def test_encoders_in_bf16_give_conditions_in_bf16_without_loss(case, place):
    config = case.backbone(precision="bf16", text=place).config
    backbone = BACKBONES[case.kind](config, "cuda")  # a GPU's weights are bf16, also where text encoders run on the CPU
    (condition,) = backbone.encode([TEXT])
    with torch.no_grad():
        expected = backbone.embed(backbone._text, TEXT)
    for array, tensor in zip((condition.sequence, condition.pooled), expected, strict=True):
        assert to_tensor(array).dtype == torch.bfloat16 and array.nbytes == 2 * tensor.numel()
        assert torch.equal(to_tensor(array), tensor.cpu())
    batch = TextBatch.build([condition], None, backbone.text_device)
    assert torch.equal(batch.sequence[0], expected[0].float()) and torch.equal(batch.pooled[0], expected[1].float())
    assert condition.key != case.backbone().condition_key(TEXT)
    if backbone.explorable:
        (perturbation,) = backbone.perturb([TEXT], E2po(conditions=2, iterations=2, init=0.5), 0)
        variant = backbone.insert(condition, perturbation, 1)
        moved = TextBatch.build([variant], None, backbone.text_device)
        assert torch.isfinite(moved.sequence).all() and torch.isfinite(moved.pooled).all()
        assert not (torch.equal(moved.sequence, batch.sequence) and torch.equal(moved.pooled, batch.pooled))
        with pytest.raises(ValueError, match="different precision"):
            case.backbone().insert(case.backbone().encode([TEXT])[0], perturbation, 1)


def test_the_shape_of_the_longest_encoding_is_known_without_any_weights(case, backbone, tmp_path):
    (condition,) = backbone.encode([LONG])
    bare = case.backbone(case.only(tmp_path / "pipeline"))
    assert bare.text_shape == (*condition.sequence.shape, *condition.pooled.shape)
    on_meta, denoiser = bare.on_meta(bare.network, bare.part), backbone.load_denoiser()
    assert {n: p.shape for n, p in on_meta.named_parameters()} == {n: p.shape for n, p in denoiser.named_parameters()}
    assert all(parameter.is_meta for parameter in on_meta.parameters())


def test_a_condition_depends_on_its_own_text_only(backbone):
    together, alone = backbone.encode([LONG, TEXT]), backbone.encode([TEXT])
    assert together[1].sequence.tobytes() == alone[0].sequence.tobytes()
    assert together[1].pooled.tobytes() == alone[0].pooled.tobytes()
    assert together[1].key == alone[0].key != together[0].key


@pytest.mark.parametrize(
    ("guidance", "batch", "size"),
    [(1.0, 1, (64, 64)), (4.5, 3, (64, 64)), (4.5, 1, (48, 80)), (1.0, 3, (32, 64))],
)
def test_our_levels_latents_and_images_are_the_stock_pipelines(case, pipe, guidance, batch, size):
    backbone = case.backbone(height=size[0], width=size[1])
    seeds = tuple(range(batch))
    noise = noise_of(backbone, seeds)
    conditions = backbone.encode([TEXT, ""])
    ours = sample(backbone, backbone.load_denoiser(), conditions, seeds, guidance)
    theirs = case.tiny.draw(pipe, [TEXT] * batch, noise.clone(), 4, guidance, "latent")
    np.testing.assert_allclose(backbone.sigmas(4), case.tiny.levels(pipe), rtol=2e-6, atol=1e-6)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())
    expected = case.tiny.draw(pipe, [TEXT] * batch, noise.clone(), 4, guidance, "pil")
    images = backbone.decode(ours)
    assert images.shape == (batch, *size, 3)
    assert np.abs(images.astype(int) - np.stack([np.asarray(image) for image in expected]).astype(int)).max() <= 1


def test_a_learner_reads_the_denoiser_alone(case, backbone, tmp_path):
    conditions = backbone.encode([TEXT, ""])
    alone = case.backbone(case.only(tmp_path / "pipeline", backbone.part))
    assert alone.latent_shape == backbone.latent_shape
    drawn = [sample(one, one.load_denoiser(), conditions, (0,), 3.0) for one in (alone, backbone)]
    assert torch.equal(*drawn)
    with pytest.raises(UserError, match="has no readable 'vae' part"):
        alone.decode(drawn[0])


def test_a_sampler_decodes_without_text_encoders_and_encodes_without_the_rest(case, backbone, tmp_path):
    conditions = backbone.encode([TEXT, ""])
    drawing = case.backbone(case.only(tmp_path / "drawing", backbone.part, "vae"))
    latents = sample(drawing, drawing.load_denoiser(), conditions, (0,))
    assert np.array_equal(drawing.decode(latents), backbone.decode(latents))
    with pytest.raises(UserError, match="has no readable 'text_encoder' part"):
        drawing.encode([TEXT])
    reading = case.backbone(case.only(tmp_path / "reading", *backbone.texts))
    for ours, theirs in zip(reading.encode([TEXT, ""]), conditions, strict=True):
        assert ours.sequence.tobytes() == theirs.sequence.tobytes()
    with pytest.raises(UserError, match=f"has no readable '{backbone.part}' part"):
        reading.load_denoiser()


def test_a_loaded_denoiser_is_frozen_and_in_evaluation_mode(backbone):
    denoiser = backbone.load_denoiser()
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    assert not any(module.training for module in denoiser.modules())


def test_every_target_of_the_recipe_names_a_layer(backbone):
    names = [name for name, _ in backbone.load_denoiser().named_modules()]
    for target in backbone.lora_targets:
        assert any(name.endswith(f".{target}") for name in names), target


def test_the_stock_pipeline_loads_our_lora_file_and_draws_exactly_our_network(case, tmp_path):
    backbone, pipe = case.backbone(lora={"rank": 3, "alpha": 6}), case.pipe()
    ours = add_adapters(backbone, backbone.load_denoiser(), ("default",))
    path = backbone.save_lora(random_state(ours), tmp_path)

    def drawn() -> np.ndarray:
        return case.tiny.draw(pipe, [TEXT], noise_of(backbone, (1,)), 3, 2.0, "np")

    network = getattr(pipe, backbone.part)
    shorten_attention(network)  # as ours has it on a CPU, whose rounding differs
    base = drawn()
    setattr(pipe, backbone.part, ours)
    expected = drawn()
    setattr(pipe, backbone.part, network)
    pipe.load_lora_weights(path.parent)
    assert np.array_equal(drawn(), expected)
    assert np.abs(expected - base).max() > 1e-3


@pytest.mark.parametrize("use", ["latent_shape", "load_denoiser", "encode"])
def test_a_pipeline_of_another_class_is_one_sentence_for_the_user(case, tmp_path, use):
    folder = shutil.copytree(case.folder, tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "SanaPipeline"}))
    wrong = case.backbone(folder)
    with pytest.raises(UserError, match=f"is a SanaPipeline, and backbone.kind {case.kind} takes a "):
        value = getattr(wrong, use)
        value(*[[TEXT]] * (use == "encode"))
