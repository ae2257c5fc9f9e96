"""What a model cannot draw or read is said before its weights are loaded, from the settings on this machine alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from align_cluster.backbones import BACKBONES
from align_cluster.backbones.parts import settings_of, tokenizer_of
from align_cluster.backbones.qwen_image import POSITIONS
from align_cluster.errors import UserError

from .contract import TEXT, Case, noise_of, sample


@pytest.fixture(scope="module", params=BACKBONES)
def case(request, tiny_pipeline):
    return Case(request.param, tiny_pipeline(request.param))


def changed(case: Case, folder: Path, name: str, **settings) -> Case:
    """The case with other settings in one of its files."""
    copy = shutil.copytree(case.folder, folder / "changed")
    (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | settings))
    return replace(case, folder=copy)


def test_settings_are_read_as_diffusers_reads_them(case):
    backbone = case.backbone()
    for cls, part in ((backbone.pipeline, None), (backbone.network, backbone.part), (backbone.vae, "vae")):
        assert settings_of(str(case.folder), part) == backbone.stock(cls).load_config(str(case.folder), subfolder=part)
    scheduler = backbone.stock("DDIMScheduler").load_config(str(case.folder), subfolder="scheduler")
    assert settings_of(str(case.folder), "scheduler") == scheduler


def test_a_sound_size_and_number_of_steps_is_no_problem_and_is_drawn(case):
    backbone = case.backbone(height=16, width=32)
    assert not list(backbone.problems([1, 4]))
    drawn = sample(backbone, backbone.load_denoiser(), backbone.encode([TEXT, ""]), (0,))
    assert backbone.decode(drawn).shape == (1, 16, 32, 3)


def test_a_size_past_the_table_of_positions_is_refused_as_the_network_would_refuse_it(tiny_pipeline):
    case = Case("sd3", tiny_pipeline("sd3"))
    largest, larger = case.backbone(height=128, width=128), case.backbone(height=128, width=144)
    denoiser, (condition,) = largest.load_denoiser(), largest.encode([TEXT])
    text = [torch.from_numpy(array)[None] for array in (condition.sequence, condition.pooled)]
    assert not list(largest.problems([1]))
    assert largest.velocity(denoiser, noise_of(largest, (0,)), torch.ones(1), *text).shape == (1, 4, 16, 16)
    (said,) = larger.problems([])
    assert said == f"backbone.width is 144, and the model of {str(case.folder)!r} has positions for 128 pixels; " + (
        "set it to at most that"
    )
    with pytest.raises(ValueError, match="cannot be greater than `pos_embed_max_size`"):
        largest.velocity(denoiser, torch.zeros(1, 4, 16, 18), torch.ones(1), *text)


def test_qwens_positions_are_those_of_the_network(tiny_pipeline):
    case = Case("qwen_image", tiny_pipeline("qwen_image"))
    backbone = case.backbone(max_sequence_length=1000)
    positions = backbone.load_denoiser().pos_embed
    assert len(positions.pos_freqs) == len(positions.neg_freqs) == POSITIONS
    side = backbone.largest_side // backbone.patch  # in tokens; the text's positions begin at half of it
    assert side // 2 + 1000 == POSITIONS
    wide = case.backbone(width=10**7 // 16 * 16)
    assert next(wide.problems([])).startswith(f"backbone.width is {10**7 // 16 * 16}, and the model of ")


def test_more_steps_than_the_model_has_noise_levels_are_refused(tiny_pipeline):
    backbone = Case("sd1", tiny_pipeline("sd1")).backbone()
    (said,) = backbone.problems([10, 1000])
    assert said.startswith("1000 denoising steps do not fit a model with 1000 noise levels")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vae/config.json", {"block_out_channels": None, "temperal_downsample": None}),
        ("model_index.json", {"_class_name": "SanaPipeline"}),
    ],
)
def test_settings_that_cannot_be_used_are_one_sentence(case, tmp_path, name, settings):
    (said,) = changed(case, tmp_path, name, **settings).backbone(height=64).problems([])
    assert "changed" in said and "\n" not in said


def test_a_file_of_settings_that_is_no_json_is_one_sentence(case, tmp_path):
    broken = changed(case, tmp_path, "vae/config.json")
    (broken.folder / "vae" / "config.json").write_text("[" * 5000)
    with pytest.raises(UserError, match="has no readable 'vae' part"):
        _ = broken.backbone(height=64).latent_shape


def test_what_is_not_on_this_machine_is_not_judged_and_a_hub_id_is_read_from_the_cache(case, tmp_path, monkeypatch):
    config = case.backbone(width=10**8, height=64).config.model_copy(update={"path": "some/model"})
    unknown = BACKBONES[case.kind](config)
    assert not list(unknown.problems([10**6])) and not list(unknown.text_notes(["a " * 5000]))
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(case.folder, snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    known = BACKBONES[case.kind](config.model_copy(update={"width": 44}))
    assert next(known.problems([])).startswith("backbone.width is 44, which the model of 'some/model' cannot divide")


def test_prompts_that_differ_past_what_encoders_read_are_counted_and_are_the_same_to_them(case):
    backbone = case.backbone()
    limit = max(backbone.readers().values())
    long = " ".join(["two blue squares"] * limit)
    texts = [f"{long} a red circle", f"{long} two", f"a {long}", TEXT]
    (said,) = backbone.text_notes([*texts, *texts])
    assert said.startswith(
        f"3 of 4 prompts have more than the {limit} tokens that the text encoders read, such as 'two "
    )
    assert said.endswith("the rest is not drawn, and 2 of them draw the same as another")
    first, second, third, _ = backbone.encode(texts)
    for name in ("sequence", "pooled"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert not np.array_equal(first.sequence, third.sequence)
    assert not list(backbone.text_notes([TEXT, f"{TEXT} {TEXT}"]))


def test_what_a_tokenizer_leaves_is_what_the_stock_pipelines_tokenizer_leaves(case):
    backbone, pipe = case.backbone(), case.pipe()
    text = " ".join(["two blue squares"] * 400)
    for part, limit in backbone.readers().items():
        tokenizer = tokenizer_of(str(case.folder), part)
        tokenizer.enable_truncation(limit)
        theirs = getattr(pipe, part)(text, truncation=True, max_length=limit).input_ids
        assert tokenizer.encode(text).ids == list(theirs)
