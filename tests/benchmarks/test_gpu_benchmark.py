"""A rehearsal of benchmarks/gpu.py: the code of every stage, with networks of a test's size, on a CPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu
import gpu_networks as networks
import pytest
import torch
import transformers
from gpu_rollouts import Graphed
from gpu_stages import STAGES

from align_cluster.backbones.sd3 import SD3
from align_cluster.rewards.clip import CLIPS
from align_cluster.rewards.detectors import PUBLISHED

SCRIPT = Path(gpu.__file__)


def rehearse(folder: Path, *arguments: str) -> dict[str, Any]:
    """Call the script; return its exit code, its table, and the stages that it left in `folder`."""
    command = [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu", "--out", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    print(done.stdout, done.stderr)
    stages = [json.loads(path.read_text())["stages"] for path in folder.glob("gpu-*.json")]
    return {"code": done.returncode, "table": done.stdout, "stages": {n: s for file in stages for n, s in file.items()}}


@pytest.mark.exhaustive
def test_every_stage_runs_to_its_end_on_a_cpu_and_has_a_figure_for_all_but_what_is_for_a_card(tmp_path):
    rehearsed = rehearse(tmp_path)
    assert rehearsed["code"] == 0
    assert {name: stage["state"] for name, stage in rehearsed["stages"].items()} == dict.fromkeys(STAGES, "done")
    for stage in rehearsed["stages"].values():
        assert stage["rows"] and not [row for row in stage["rows"].values() if "error" in row]
    skipped = [
        name for stage in rehearsed["stages"].values() for name, row in stage["rows"].items() if "skipped" in row
    ]
    for_a_card = ("compiled", "graphs", "cuDNN", "tests/")
    assert skipped and all(any(word in name for word in for_a_card) for name in skipped)
    measured = [
        row["value"] for stage in rehearsed["stages"].values() for row in stage["rows"].values() if "value" in row
    ]
    assert len(measured) > 25 and rehearsed["table"].count("| failed |") == 0


@pytest.mark.exhaustive
def test_a_second_call_repeats_only_what_is_not_done(tmp_path):
    rehearsed = rehearse(tmp_path, "--stages", "learner,rewards")
    assert rehearsed["code"] == 0 and {stage["state"] for stage in rehearsed["stages"].values()} == {"done"}
    path = tmp_path / "gpu-cpu.json"
    kept = json.loads(path.read_text())
    lost = "clip-l, 2 images"
    rows = kept["stages"]["rewards"]["rows"]
    first = rows.pop(lost)
    path.write_text(json.dumps(kept | {"stages": kept["stages"] | {"rewards": {"state": "killed", "rows": rows}}}))
    arguments = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--stages", "rewards,learner"]
    assert gpu.main(arguments) == 0
    again = json.loads(path.read_text())["stages"]
    assert again["learner"] == kept["stages"]["learner"] and again["rewards"]["state"] == "done"
    assert again["rewards"]["rows"][lost] != first
    assert {**again["rewards"]["rows"], lost: None} == {**rows, lost: None}


def test_a_stage_that_hangs_or_crashes_costs_itself_and_keeps_its_rows(tmp_path, monkeypatch):
    """The stage's process is a script that writes a row, and then hangs or dies."""
    script = tmp_path / "gpu.py"
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    for ending, state in (
        ("time.sleep(600)", "stopped at its limit of 5 s"),
        ("os._exit(3)", "ended with exit code 3"),
    ):
        script.write_text(
            "import os, sys, time\n"
            "from pathlib import Path\n"
            "job = Path(sys.argv[sys.argv.index('--child') + 1])\n"
            'job.with_name("rows.jsonl").write_text(\'{"name": "new", "value": 2}\\n\')\n' + ending
        )
        args = gpu.parsed(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
        stage = gpu.run("rollout", args, {"old": {"value": 1}}, 5)
        assert stage["state"] == state and stage["rows"] == {"old": {"value": 1}, "new": {"value": 2}}


def test_all_stages_together_stay_below_eight_minutes():
    assert sum(stage.limit_s for name, stage in STAGES.items() if name != "plan") <= gpu.LIMIT_S < 480


def test_a_stage_that_is_not_there_is_one_sentence(capsys):
    with pytest.raises(SystemExit, match="there is no stage sd3; the stages are plan, rollout"):
        gpu.main(["--tiny", "--device", "cpu", "--stages", "sd3"])


def weights(model: type, folder: Path) -> int:
    with torch.device("meta"):
        made = model(model.config_class.from_pretrained(folder))
    return sum(parameter.numel() for parameter in made.parameters())


def test_reward_models_have_the_published_numbers_of_weights(tmp_path):
    published = {"clip-l": "openai/clip-vit-large-patch14", "pickscore": "yuvalkirstain/PickScore_v1"}
    for name, identity in published.items():
        folder = networks.write_clip(name, tmp_path / name, tiny=False)
        assert weights(transformers.CLIPModel, folder) == pytest.approx(CLIPS[identity].parameters, rel=1e-3)
    folder = networks.write_mask2former(tmp_path / "mask2former", tiny=False)
    expected = PUBLISHED["facebook/mask2former-swin-small-coco-instance"].parameters
    assert weights(transformers.Mask2FormerForUniversalSegmentation, folder) == pytest.approx(expected, rel=1e-3)


def test_parts_are_made_where_they_are_used_with_the_same_weights_each_time(tmp_path):
    folder = networks.write_pipeline("sd35", tmp_path, tiny=True)
    with networks.random_weights("cpu"):
        first, second = (SD3(SD3.Config(path=str(folder))).load_denoiser() for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other) and one.isfinite().all() and not one.requires_grad
    with networks.random_weights("meta"):
        made = SD3(SD3.Config(path=str(folder)), "meta").load_denoiser()
    assert all(tensor.is_meta for tensor in (*made.parameters(), *made.buffers())), "nothing is made on the CPU first"


@pytest.mark.gpu
def test_a_graph_answers_other_inputs_as_the_network_does(tmp_path):
    folder = networks.write_pipeline("sd35", tmp_path, tiny=True)
    backbone = SD3(SD3.Config(path=str(folder), height=64, width=64), "cuda")
    with networks.random_weights("cuda"):
        denoiser = backbone.load_denoiser()
    graphed, (tokens, width, pooled) = Graphed(backbone.velocity), backbone.text_shape
    for rows in (2, 2, 3):
        shapes = (rows, *backbone.latent_shape), (rows,), (rows, tokens, width), (rows, pooled)
        inputs = [torch.rand(shape, device="cuda") for shape in shapes]
        with torch.no_grad():
            torch.testing.assert_close(graphed(denoiser, *inputs), backbone.velocity(denoiser, *inputs))
    assert len(graphed.graphs) == 2
