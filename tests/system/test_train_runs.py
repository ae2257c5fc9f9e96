"""Whole runs on Ray: everything that a run promises to leave behind is there, and it says the same as the weights."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from align_cluster.config.load import config_hash, load
from align_cluster.observe.metrics import describe
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import read_jsonl

KINDS = ("nft", "grpo")
EVERY_STEP = {
    *("reward/geneval/mean", "reward/clip/mean", "group/reward_std_mean", "group/zero_std_ratio", "group/masked"),
    *("time/rollout", "time/reward", "time/credit", "time/update", "time/publish", "time/step", "time/learner"),
    *("train/loss", "train/grad_norm", "lr", "throughput/images_per_s"),
    *("weights/bytes", "weights/adopt_s", "weights/version"),
    *("images/contrast", "images/diversity", "train/skipped", "train/empty"),
}
ONLY = {"nft": {"train/kl", "train/old_gap"}, "grpo": {"train/log_ratio_max", "train/first_log_ratio_max"}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_every_file_of_the_contract(runs, kind):
    files = RunDir(runs[kind].path)
    config = load(files.config, [])
    assert config.algorithm.kind == kind and config.steps == 2
    assert files.grid_steps() == [0, 1, 2]
    assert len(json.loads(files.grid_prompts.read_text())) == 2
    assert Image.open(files.grid(0)).size == Image.open(files.grid(2)).size
    events = EventAccumulator(str(files.tensorboard)).Reload()
    assert [event.step for event in events.Images("grid")] == [0, 1, 2]
    assert kind.encode() in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]
    report = files.report.read_text()
    assert report.startswith("<!doctype html>") and "data:image/png;base64," in report
    assert {path.name for path in files.path.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "evaluations.jsonl", "summary.json", "report.html"),
        "timeline.json",
        *("grids", "lora", "tensorboard", "checkpoints", "lock", "state.json"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_writes_its_declared_metrics(runs, kind):
    rows = read_jsonl(RunDir(runs[kind].path).metrics)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        names = row.keys() - {"step", "seconds"}
        assert EVERY_STEP | ONLY[kind] <= names
        assert all(describe(name) and math.isfinite(row[name]) for name in names)
    assert rows[0]["weights/version"] < rows[1]["weights/version"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_summary_counts_what_was_done(runs, kind):
    run = runs[kind]
    summary = run.summary
    held_out, grids, training = 2 * 2 * 2, 3 * 2 * 2, 2 * 2 * 4
    assert summary["images_drawn"] == held_out + grids + training
    assert summary["before"]["count"] == summary["after"]["count"] == 4
    assert summary["headline"] in summary["before"]["overall"] and summary["workers_lost"] == 0
    assert math.isclose(sum(summary["stage_seconds"].values()), summary["wall_seconds"], rel_tol=1e-6)
    assert summary["config_hash"] == config_hash(load(run.path / "config.yaml", []))
    evaluations = read_jsonl(RunDir(run.path).evaluations)
    assert [(row["step"], row["adapter"]) for row in evaluations] == [(0, "base"), (2, "evaluation")]
    assert evaluations[-1]["overall"] == summary["after"]["overall"]
    for row in evaluations:
        means = [one[row["headline"]].values() for one in row["by_prompt"].values()]
        assert row["headline"] == summary["headline"] and sum(map(len, means)) == row["prompts"] == 2
        assert math.isclose(
            sum(sum(one) / len(one) for one in means) / len(means), row["overall"][row["headline"]], rel_tol=1e-5
        )


def test_before_the_first_update_the_learner_has_exactly_the_rollouts_log_probs(runs):
    assert runs["grpo"].summary["self_check"] == {"max_abs_log_ratio": 0.0}
    assert runs["nft"].summary["self_check"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_pipeline_loads_the_lora_and_draws_other_images(runs, kind):
    import torch
    from diffusers import StableDiffusion3Pipeline

    from align_cluster.embedded import pipeline_path

    def draw() -> np.ndarray:
        return pipeline(
            "a photo of a red circle", num_inference_steps=4, guidance_scale=1.0, output_type="np",
            max_sequence_length=0, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        pipeline_path(), text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    base = draw()
    pipeline.load_lora_weights(Path(runs[kind].summary["lora_path"]))
    changed = draw()
    assert np.abs(changed - base).max() > 1 / 255
    pipeline.unload_lora_weights()
    np.testing.assert_array_equal(draw(), base)


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_of_the_last_step_is_the_model_that_the_run_ends_with(runs, kind):
    from align_cluster.evaluate.checkpoints import opened

    with opened(f"{runs[kind].path}@2") as unfolded:
        assert RunDir(unfolded.path).lora_weights.read_bytes() == RunDir(runs[kind].path).lora_weights.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_evaluate_command_repeats_the_runs_own_scores(runs, kind):
    from align_cluster.backbones.lora_file import read_lora
    from align_cluster.evaluate.local import evaluate

    run = runs[kind]
    scores = evaluate(load(run.path / "config.yaml", []), read_lora(Path(run.summary["lora_path"])))
    assert scores["overall"] == run.summary["after"]["overall"]
    assert scores["tasks"] == run.summary["after"]["tasks"]
