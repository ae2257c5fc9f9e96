"""Real Ray runs that follow the gradient of a reward: on images of the model's own, and on a folder of real ones."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from align_cluster.config.check import check
from align_cluster.config.load import load
from align_cluster.embedded import scene
from align_cluster.embedded.render import render
from align_cluster.observe.metrics import describe
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import read_jsonl

CONFIG = Path(__file__).parents[2] / "configs" / "embedded_srpo.yaml"
SMALL = (
    *("steps=2", "prompts_per_step=4", "rollout.group_size=2", "rollout.steps=4", "backbone.lora.rank=4"),
    *("cluster.timeout_s=240", "evaluate.count=2", "evaluate.images_per_prompt=2", "evaluate.every=0"),
    *("evaluate.grid_every=0", "evaluate.grid_prompts=2", "evaluate.grid_columns=2"),
)


@pytest.fixture
def folder(tmp_path):
    """Twelve captioned pictures and one without a caption."""
    records = scene.prompts("colors", "train")[:13]
    for index, (record, image) in enumerate(zip(records, render(list(records), 0), strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index:02}.png")
        if index < 12:
            (tmp_path / f"{index:02}.txt").write_text(record["prompt"])
    return tmp_path


@pytest.mark.slow
def test_srpo_trains_on_a_folder_of_images_with_two_learner_ranks(folder, train):
    offline = ["rollout.offline=true", "prompts.kind=images", f"prompts.folder={folder}"]
    config = load(CONFIG, ["name=offline", *SMALL, *offline, "cluster.learners=2"])
    assert check(config) == [f"{folder}: of 13 images are left out 1 without a caption, such as 12.png"]
    run = train(config)
    rows = read_jsonl(RunDir(run.path).metrics)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(describe(name) for name in row.keys() - {"step", "seconds"})
        assert all(math.isfinite(row[f"train/{name}"]) for name in ("loss", "reward", "preference"))
        assert row["train/grad_norm"] > 0 and 0 < row["train/recovery"] < 0.5 and row["train/satisfied"] == 0
        assert not any(name.startswith(("advantage/", "group/")) for name in row)
    assert rows[0]["reward/clip/mean"] > 0.7, "the samplers' images are the folder's"
    summary = json.loads(RunDir(run.path).summary.read_text())
    assert "reward/preference/share" in summary["after"]["overall"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [("cluster.samplers=1", "cluster.learners=1"), ("cluster.samplers=2",)])
def test_the_same_job_ends_with_the_same_weights(workers, train, first_weights):
    """On one noise for each step, which the learner makes again from its seed."""
    one_noise = ["rollout.group_size=1", "rollout.same_noise=step", "prompts_per_step=8"]
    run = train(load(CONFIG, ["name=same", *SMALL, *one_noise, "cluster.learners=1", *workers]))
    assert run.summary["lora_checksum"] == first_weights.setdefault("srpo", run.summary["lora_checksum"])


@pytest.fixture(scope="module")
def first_weights():
    return {}
