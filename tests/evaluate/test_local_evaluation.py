"""Sampling and evaluation without Ray, on the embedded pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from align_cluster.backbones.adapters import adapter_parameters
from align_cluster.backbones.sd3 import SD3
from align_cluster.config.load import load
from align_cluster.evaluate.lora import find_lora, read_lora, sampler_with
from align_cluster.evaluate.run import evaluate
from align_cluster.evaluate.sample import sample
from align_cluster.evaluate.table import rows
from align_cluster.rollouts.sampler import Sampler
from align_cluster.types import Prompt, Scores, UserError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
PROMPTS = [Prompt(0, "a photo of a red circle"), Prompt(1, "a photo of two stars")]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA file of rank 4 with a scale of its own, large enough to change every image."""
    config = SD3.Config(lora={"rank": 4, "alpha": 12})
    sampler = Sampler(config)
    rng = np.random.default_rng(0)
    parameters = adapter_parameters(sampler.denoiser, "default")
    state = {name: 0.1 * rng.standard_normal(tuple(p.shape)).astype(np.float32) for name, p in parameters.items()}
    folder = tmp_path_factory.mktemp("run") / "lora"
    return sampler.backbone.save_lora(state, folder), state


def draw(out, lora=None, **settings):
    settings = {"count": 2, "seed": 0, "steps": 2, "guidance": 1.0} | settings
    sample(load(QUICKSTART), lora, PROMPTS, out, **settings)
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("0*.png"))])


def test_a_lora_file_is_read_with_its_rank_and_scale_whatever_the_config_says(lora):
    file, state = lora
    read = read_lora(file)
    assert (read.rank, read.alpha) == (4, 12)
    assert read.state.keys() == state.keys() and all(np.array_equal(read.state[k], state[k]) for k in state)
    sampler = sampler_with(SD3.Config(), file, 1)
    assert sampler.backbone.config.lora.rank == 4 and sampler.version == 1


def test_a_run_folder_a_lora_folder_and_a_file_mean_the_same(lora):
    file, _ = lora
    assert find_lora(file) == find_lora(file.parent) == find_lora(file.parent.parent) == file


def test_what_is_no_lora_is_refused(tmp_path, lora):
    with pytest.raises(UserError, match="holds no LoRA"):
        find_lora(tmp_path)
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor file")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_lora(tmp_path / "text.safetensors")
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no LoRA of a denoiser"):
        read_lora(tmp_path / "model.safetensors")
    save_file({"transformer.x.lora_A.weight": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not fit embedded"):
        sampler_with(SD3.Config(), tmp_path / "other.safetensors", 1)


def test_sample_writes_images_an_overview_and_how_they_were_made(tmp_path, lora):
    file, _ = lora
    images = draw(tmp_path, lora=file)
    assert images.shape == (4, 48, 48, 3) and (tmp_path / "grid.png").exists()
    facts = json.loads((tmp_path / "samples.json").read_text())
    assert facts["lora"] == str(file) and facts["steps"] == 2
    assert [image["file"] for image in facts["images"]] == ["000_00.png", "000_01.png", "001_00.png", "001_01.png"]
    assert len({image["seed"] for image in facts["images"]}) == 4


def test_the_seed_fixes_the_images_and_the_lora_changes_them(tmp_path, lora):
    base = draw(tmp_path / "a")
    assert np.array_equal(base, draw(tmp_path / "b"))
    assert not np.array_equal(base, draw(tmp_path / "c", seed=1))
    assert not np.array_equal(base, draw(tmp_path / "d", lora=lora[0]))
    assert not np.array_equal(base, draw(tmp_path / "e", guidance=3.0))


def test_evaluation_scores_every_task_and_repeats_exactly(lora):
    small = ["evaluate.count=6", "evaluate.images_per_prompt=2", "evaluate.steps=2", "evaluate.grid_prompts=1"]
    config = load(QUICKSTART, small)
    scores = evaluate(config)
    assert scores["count"] == 12 and scores["prompts"] == 6 and scores["failures"] == {}
    assert set(scores["tasks"]) == set(config.evaluate.prompts.tasks)
    assert {"reward/geneval", "reward/geneval/accuracy", "reward/clip"} <= set(scores["overall"])
    assert evaluate(config) == scores
    assert evaluate(config, lora[0])["overall"]["reward/clip"] != scores["overall"]["reward/clip"]


def test_rows_leave_out_what_failed():
    values = {"a": np.array([0.5, 0.25]), "b": np.array([1.0, np.nan])}
    valid = {"a": np.array([True, False]), "b": np.array([True, True])}
    scores = Scores(values, valid, details={"a/part": np.array([np.nan, 2.0])})
    first, second = rows(Prompt(7, "x", {"tag": "colors"}), scores)
    assert first == {"task": "colors", "prompt_id": 7, "reward/a": 0.5, "reward/b": 1.0, "reward/a/part": None}
    assert second == {"task": "colors", "prompt_id": 7, "reward/a": None, "reward/b": None, "reward/a/part": 2.0}
