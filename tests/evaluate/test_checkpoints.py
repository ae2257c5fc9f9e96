"""Checkpoints in the place of a run: what `sample`, `evaluate` and `export` make of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from align_cluster.backbones.adapters import add_adapters
from align_cluster.backbones.lora_file import read_lora
from align_cluster.backbones.sd3 import SD3
from align_cluster.checkpoint.store import Store
from align_cluster.cli import main
from align_cluster.cluster.nodes import software
from align_cluster.config.load import dump, load
from align_cluster.errors import UserError
from align_cluster.evaluate.checkpoints import opened
from align_cluster.evaluate.sample import SampleRequest, sample
from align_cluster.evaluate.steer import SavedCritic
from align_cluster.files import write_text
from align_cluster.learner.state import Snapshot
from align_cluster.loop.state import State
from align_cluster.observe.grids import save_grid
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import MetricWriter
from align_cluster.streams import VERSION
from align_cluster.types import Prompt

from ..backbones.contract import random_state

TINY = Path(__file__).parents[1] / "system" / "tiny.yaml"
TEXT = "a photo of a red circle"
OVERRIDES = ["steps=9", "backbone.precision=fp32", "backbone.lora={rank: 2, alpha: 6}", "evaluate.steps=1"]
SCORES = {2: 0.9, 4: 0.9, 6: 0.1}  # step 8 is saved after an interrupt, without a score


def scored(value: float) -> dict:
    return {"overall": {"reward/geneval/graded": value}, "tasks": {"colors": {"reward/geneval/graded": value}}}


@pytest.fixture(scope="module")
def weights():
    """LoRA weights by step, of the last update and averaged."""
    network = add_adapters(SD3(load(TINY, OVERRIDES).backbone), SD3(SD3.Config()).load_denoiser(), ("default",))
    return {step: random_state(network, 0.02 * step) for step in (1, 2, 4, 6, 8)}


@pytest.fixture
def run(tmp_path, weights):
    """A run that was interrupted after step 8 of 9. Its averaged weights are those that it evaluates and ships."""
    return interrupted(tmp_path, weights)


def interrupted(tmp_path: Path, weights, *overrides: str) -> RunDir:
    config = load(TINY, [*OVERRIDES, *overrides])
    run = RunDir.create(tmp_path, "tiny")
    write_text(run.config, dump(config))
    store = Store(config.checkpoint.path and f"{config.checkpoint.path}/tiny" or str(run.checkpoints))
    with MetricWriter(run.path) as metrics:
        metrics.evaluation(0, 0, "base", scored(0.0))
        for step in (2, 4, 6, 8):
            metrics.write(step, {"reward/clip/mean": float(step)})
            if step in SCORES:
                metrics.evaluation(step, step, "evaluation", scored(SCORES[step]))
            learner = Snapshot.of({"updates": step, "steps": step}, tensors(weights, step))
            facts = {"config": config.model_dump(mode="json"), "versions": software(), "streams": VERSION}
            facts |= {"inputs": {}, "before": scored(0.0), "credit": {}}
            about = {"score": SCORES.get(step), "good": True}
            store.write(step, State(step, facts, learner, texts=metrics.mark()).files(), about)
    for step in (0, 6):
        save_grid(np.full((2, 48, 48, 3), 20 * step, np.uint8), 2, run.grid(step), [TEXT])
    return run


def tensors(weights, step: int) -> dict[str, np.ndarray]:
    found = {f"adapter/default/{name}": value for name, value in weights[1].items()}
    return found | {f"ema/{name}": value for name, value in weights[step].items()}


def shipped(tmp_path: Path, state: dict[str, np.ndarray]) -> Path:
    """The file that a run which ends with these weights leaves."""
    return SD3(load(TINY, OVERRIDES).backbone).save_lora(state, tmp_path / "shipped")


def test_a_checkpoint_draws_what_the_run_would_have_drawn_that_ended_there(run, tmp_path, weights, capsys):
    lora = read_lora(shipped(tmp_path, weights[4]))
    request = SampleRequest(prompts=[Prompt(0, TEXT)], count=1, score=False)
    sample(load(run.config), lora, request, tmp_path / "expected")
    expected = Image.open(tmp_path / "expected" / "000_00.png").tobytes()
    named = {"--run": f"{run.checkpoints}/step_000004", "--lora": f"{run.path}@best"}
    for number, (option, given) in enumerate(named.items()):
        out = tmp_path / str(number)
        drawing = ["--prompt", TEXT, "--count", "1", "--no-score", "--out", str(out)]
        assert main(["sample", option, given, *drawing]) == 0, capsys.readouterr().err
        assert Image.open(out / "000_00.png").tobytes() == expected
        facts = json.loads((out / "samples.json").read_text())
        assert facts["lora"] == (given if option == "--run" else f"{run.path}@4")
    assert main(["evaluate", f"{run.path}@4", "--set", "evaluate.count=1"]) == 0
    assert f"held-outscores,{run.path}@4" in "".join(capsys.readouterr().out.split())  # the terminal breaks lines


@pytest.mark.parametrize(("given", "step"), [("{}@2", 2), ("{}@best", 4), ("{}/checkpoints/step_8", 8)])
def test_a_checkpoint_has_the_file_that_the_run_would_have_left(run, tmp_path, weights, given, step):
    with opened(given.format(run.path)) as found:
        assert RunDir(found.path).lora_weights.read_bytes() == shipped(tmp_path, weights[step]).read_bytes()
    assert not found.path.exists()


def test_without_an_average_the_weights_of_the_last_update_are_shipped(weights):
    state = {f"adapter/{name}/x": np.full(2, value, np.float32) for name, value in (("default", 1), ("old", 2))}
    assert Snapshot.of({"updates": 1}, state).shipped()["x"].tolist() == [1, 1]
    assert Snapshot.of({"updates": 1}, state | {"ema/x": np.full(2, 3.0)}).shipped()["x"].tolist() == [3, 3]


def test_the_last_step_is_the_best_where_the_runs_own_last_scores_say_so(run):
    with MetricWriter(run.path, 8) as metrics:
        metrics.evaluation(8, 8, "evaluation", scored(0.95))
    with opened(f"{run.path}@best") as found:
        assert found.checkpoint == Path(f"{run.path}@8")


def test_an_exported_checkpoint_says_what_is_known_of_it_and_of_no_later_step(run, tmp_path, weights, capsys):
    assert main(["export", f"{run.path}@4", "--to", "lora", "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "4 of 2 prompts x 4 images" in card and "0.900" in card and "+0.900" in card
    assert not (tmp_path / "out" / "after.png").exists()  # the grids are of steps 0 and 6
    ours, theirs = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors"), shipped(tmp_path, weights[4])
    assert all(np.array_equal(ours[name], value) for name, value in load_file(theirs).items())
    assert main(["export", f"{run.path}@8", "--to", "lora", "--out", str(tmp_path / "unscored")]) == 0
    card = (tmp_path / "unscored" / "README.md").read_text()
    assert "| 0.000 | – | – |" in card and not (tmp_path / "unscored" / "after.png").exists()
    assert main(["export", f"{run.path}@6", "--to", "lora", "--out", str(tmp_path / "shown")]) == 0
    assert (tmp_path / "shown" / "after.png").read_bytes() == run.grid(6).read_bytes()


def test_a_checkpoint_of_an_object_store_is_found_by_its_run(tmp_path, weights):
    run = interrupted(tmp_path, weights, "checkpoint.path=memory://checkpoints-as-models")
    with opened(f"{run.path}@2") as found:
        assert RunDir(found.path).lora_weights.read_bytes() == shipped(tmp_path, weights[2]).read_bytes()


def test_a_checkpoint_of_a_run_with_a_critic_steers(tmp_path, weights):
    config = load(TINY, [*OVERRIDES, "algorithm.kind=ppo", "rollout.group_size=1"])
    run, moments = RunDir.create(tmp_path, "tiny"), {"count": 2.0, "mean": 0.5, "squares": 1.0}
    learner = Snapshot.of({"updates": 1}, tensors(weights, 2) | {"critic/head": np.ones(3, np.float32)})
    credit = {"moments": dict.fromkeys(config.trained, moments), "updates": 1, "warm": True}
    facts = {"config": config.model_dump(mode="json"), "versions": {}, "before": scored(0.0), "credit": credit}
    Store(str(run.checkpoints)).write(2, State(2, facts, learner).files(), {})
    with opened(run.checkpoints / "step_000002") as found:
        critic = SavedCritic.read(found.path, config, found.checkpoint)
    assert critic.rewards == config.trained and critic.state["head"].tolist() == [1, 1, 1]
    assert critic.moments["clip"].mean == 0.5


def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(run, tmp_path, capsys):
    refused = {
        f"{run.path}@3": "there is no checkpoint of step 3; {} has those of steps 2, 4, 6, 8",
        f"{run.checkpoints}/step_000003": "there is no checkpoint of step 3; {} has those of steps 2, 4, 6, 8",
        f"{tmp_path}/nowhere@best": "is no run directory; write the folder that `train` made before the @",
        str(run.path): f"or one of its checkpoints: {run.path}@best, {run.path}@2, {run.path}@4",
    }
    for given, said in refused.items():
        for command in (["sample", "--prompt", TEXT, "--run", given], ["export", given, "--to", "lora", "--out", "x"]):
            assert main(command) == 2
            error = capsys.readouterr().err
            assert said.format(run.checkpoints) in error and error.count("\n") == 1, error
    for step in SCORES:
        Store(str(run.checkpoints)).delete(step)
    with pytest.raises(UserError, match=r"no checkpoint has a held-out score; write .*@STEP: .* has those of steps 8$"):
        opened(f"{run.path}@best").__enter__()


def test_a_damaged_checkpoint_is_no_model(run):
    (run.checkpoints / "step_000004" / "run.json").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"@4 is damaged: run.json has 2 bytes instead of .* of steps 2, 4, 6, 8$"):
        opened(f"{run.path}@best").__enter__()
