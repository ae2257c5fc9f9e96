"""Every backbone trains two steps with every algorithm that can train it; the others are refused with the reason.

Both tables are read here, so that a new file is covered by itself. The steps are taken in this process; test_twins.py
proves for six runs that Ray changes nothing.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from align_cluster.algorithms import ALGORITHMS
from align_cluster.backbones import BACKBONES
from align_cluster.backbones.lora_file import read_lora
from align_cluster.config.check import check
from align_cluster.errors import UserError
from align_cluster.evaluate.local import evaluate

from ..backbones.contract import Case
from ..inprocess import assert_same_run

SMALL = (
    *("rewards={clip: {kind: clip_score}}", "rollout.group_size=2", "rollout.steps=3", "rollout.guidance=2"),
    *("backbone.lora.rank=4", "cluster.samplers=1", "cluster.learners=1", "evaluate.count=2", "evaluate.guidance=2"),
    *("evaluate.images_per_prompt=1", "evaluate.grid_every=0", "evaluate.grid_columns=1"),
)

EXPLORED = (
    *("exploration={kind: e2po, conditions: 2, iterations: 3}", "algorithm.ratio=guard", "advantage.std=batch"),
    *("advantage.shaping={kind: slas, gamma: adaptive, bound: worst_case, refresh: 1}", "prompts_per_step=4"),
)


def fits(kind: str, algorithm: str) -> bool:
    return BACKBONES[kind].flow or not ALGORITHMS[algorithm].needs_flow


WORDS = ("algorithm.positive=[large]", "algorithm.negative=[small]")  # which the embedded CLIP knows
AT_ONCE = {
    "ppo": ("algorithm.warm_up.updates=0",),  # so that the actor learns in the first step
    "srpo": ("advantage={}", "learner.gradient_checkpointing=true", *WORDS),
    "refl": ("advantage={}", "algorithm.steps=[1, 2]"),
    "draft": ("advantage={}", "algorithm.last=2"),
}

AS_PUBLISHED = {  # how the official scripts of ReFL and SRPO draw
    ("sd1", "refl"): ("rollout.step={kind: ddim, eta: 1.0}",),
    ("flux", "srpo"): ("rollout.step={kind: euler, truncate_timesteps: true}", "rollout.schedule.kind=linear"),
}

PAIRS = [(kind, algorithm) for kind in BACKBONES for algorithm in ALGORITHMS]


@pytest.fixture
def job(tiny, tiny_pipeline):
    """Function (backbone, algorithm) -> a run on that backbone's tiny pipeline."""

    def make(kind, algorithm, *overrides):
        case = Case(kind, tiny_pipeline(kind))
        settings = {"kind": kind, "path": case.folder, **getattr(case.tiny, "SETTINGS", {})}
        given = [f"backbone.{name}={value}" for name, value in settings.items()]
        return tiny(algorithm, f"name={kind}-{algorithm}", *given, *SMALL, *AT_ONCE.get(algorithm, ()), *overrides)

    return make


# On a card every backbone meets one algorithm, and every algorithm one backbone.
ON_A_CARD = [pair for pair in PAIRS if fits(*pair) and ("grpo" in pair or "sd3" in pair)]
TWO_STEPS = [pytest.param(*pair, "cpu") for pair in PAIRS if fits(*pair)]
TWO_STEPS += [pytest.param(*pair, "cuda", marks=pytest.mark.gpu) for pair in ON_A_CARD]


@pytest.mark.parametrize(("kind", "algorithm", "device"), TWO_STEPS)
def test_a_backbone_takes_two_steps(kind, algorithm, device, job, in_process):
    config = job(kind, algorithm, *AS_PUBLISHED.get((kind, algorithm), ()))
    assert check(config) == []
    done = in_process(config, device)
    assert [row["step"] for row in done.rows] == [1, 2]
    assert all(math.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0 for row in done.rows)
    if not ALGORITHMS[algorithm].needs_density:
        assert done.self_check is None
    else:  # on a card the kernels with and without a gradient may be others
        assert done.self_check["max_abs_log_ratio"] <= (0 if device == "cpu" else config.learner.ratio_tolerance)
    assert all(math.isfinite(scores["reward/clip"]) for scores in (done.before, done.after))
    lora = read_lora(done.lora)
    assert lora.rank == 4
    if algorithm == "grpo" and device == "cpu":  # all backbones take it, and `evaluate` knows nothing of algorithms
        assert evaluate(config, lora)["overall"] == done.after
    assert any(np.abs(value).max() > 0 for name, value in lora.state.items() if "lora_B" in name)


ON_RAY = [
    pytest.param(*pair, marks=pytest.mark.slow if pair[1] == "grpo" else pytest.mark.exhaustive)
    for pair in PAIRS
    if fits(*pair)
]


@pytest.mark.parametrize(("kind", "algorithm"), ON_RAY)
def test_ray_changes_nothing_for_any_backbone_and_algorithm(kind, algorithm, job, in_process, train):
    config = job(kind, algorithm)
    assert_same_run(in_process(config), train(config).path)


@pytest.mark.parametrize(("kind", "algorithm"), [pair for pair in PAIRS if not fits(*pair)])
def test_an_algorithm_that_cannot_train_a_backbone_is_refused_with_the_reason(kind, algorithm, job):
    with pytest.raises(UserError) as caught:
        check(job(kind, algorithm))
    (sentence,) = str(caught.value).splitlines()
    assert sentence.startswith(f"algorithm.kind is {algorithm}, whose loss is on a flow's velocity, and backbone.kind ")
    assert f"{kind} predicts epsilon or v; set algorithm.kind to grpo" in sentence


def predicting_v(folder: Path, place: Path) -> Path:
    """A copy of a pipeline whose scheduler says that the network predicts v."""
    file = Path(shutil.copytree(folder, place / "v")) / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    return place / "v"


def test_exploration_shaping_and_guarded_ratios_compose_on_a_network_that_predicts_v(
    job, in_process, tiny_pipeline, tmp_path
):
    folder = predicting_v(tiny_pipeline("sd1"), tmp_path)
    config = job("sd1", "grpo", *EXPLORED, f"backbone.path={folder}")
    assert check(config) == [] and BACKBONES["sd1"](config.backbone).prediction == "v"
    done = in_process(config)
    first, second = done.rows
    assert done.self_check == {"max_abs_log_ratio": 0.0}
    assert first["explore/anchor_cosine"] < 1
    assert first["slas/lambda_max"] > 0 and second["advantage/gamma"] == first["slas/gamma"]
