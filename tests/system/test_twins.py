"""Every embedded run file takes two real steps: what ships, runs."""

import math
from pathlib import Path

import pytest

from align_cluster.config.check import check
from align_cluster.config.load import load
from align_cluster.observe.metrics import describe
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import read_jsonl

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = (
    *("steps=2", "prompts_per_step=2", "cluster.timeout_s=240", "backbone.lora.rank=4"),
    *("learner.updates_per_step=2", "cluster.samplers=1", "cluster.learners=1"),  # start-up is what takes time here
    *("evaluate.count=2", "evaluate.images_per_prompt=2", "evaluate.every=0", "evaluate.grid_every=0"),
    *("evaluate.grid_prompts=2", "evaluate.grid_columns=2"),
)
# Full-size run files of methods that were published for other models than Stable Diffusion 3.5.
LARGE = {"srpo": "flux_dev_srpo_hps", "refl": "sd15_refl", "draft": "sd15_draft", "draft_lv": "sd15_draft_lv"}
TWINS = sorted(path.stem for path in CONFIGS.glob("embedded_*.yaml"))


@pytest.mark.parametrize("twin", [twin.removeprefix("embedded_") for twin in TWINS])
def test_every_embedded_run_file_has_the_full_size_one_beside_it(twin):
    names = (f"embedded_{twin}", LARGE.get(twin, f"sd35_medium_{twin}"))
    small, large = (load(CONFIGS / f"{name}.yaml", []) for name in names)
    assert small.algorithm.kind == large.algorithm.kind and small.step_kind.kind == large.step_kind.kind
    assert (small.exploration is None) == (large.exploration is None) and small.conditions == large.conditions
    assert (small.advantage.shaping is None) == (large.advantage.shaping is None)
    assert type(small.window) is type(large.window)


@pytest.mark.parametrize("name", ["sd15_critic", "sd35_medium_critic"])
@pytest.mark.parametrize("trained", [["geneval"], ["hps"], ["clip"], ["geneval", "hps", "clip"]])
def test_the_critics_run_files_train_each_reward_alone_and_all_together(name, trained):
    roles = [f"rewards.{one}.role=monitor" for one in ("geneval", "hps", "clip") if one not in trained]
    config = load(CONFIGS / f"{name}.yaml", roles)
    assert check(config) == [] and config.trained == trained and config.rollout.group_size == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_every_embedded_run_file_takes_two_steps(name, train):
    at_once = ["algorithm.warm_up.updates=0"] if name == "embedded_critic" else []  # or the actor would wait
    config = load(CONFIGS / f"{name}.yaml", [f"name={name}", *SMALL, *at_once])
    run = train(config)
    rows = read_jsonl(RunDir(run.path).metrics)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(describe(key) for key in row.keys() - {"step", "seconds"})
        assert math.isfinite(row["train/loss"]) and row["train/grad_norm"] >= 0
    if config.window is not None:
        assert run.summary["self_check"] == {"max_abs_log_ratio": 0.0}
    if config.exploration:
        assert all(-1 <= row["explore/anchor_cosine"] <= 1 and row["time/explore"] > 0 for row in rows)
        assert all(row["group/std_across_conditions"] >= 0 for row in rows)
    if config.advantage.shaping:
        assert all(row["advantage/gamma"] == config.advantage.shaping.gamma for row in rows)


@pytest.mark.slow
def test_an_adaptive_exponent_is_measured_and_used(train):
    """The first step is linear, since nothing is known yet; the second uses what the first one's update measured."""
    overrides = ["name=adaptive", "advantage.shaping.gamma=adaptive", "advantage.shaping.delta=1e-2", *SMALL]
    run = train(load(CONFIGS / "embedded_slas.yaml", [*overrides, "learner.updates_per_step=1", "cluster.learners=2"]))
    first, second = read_jsonl(RunDir(run.path).metrics)
    assert first["advantage/gamma"] == 0 and first["slas/lambda_max"] > 0 and first["slas/score_norm"] > 0
    assert second["advantage/gamma"] == first["slas/gamma"] > 0
    assert first["slas/moment"] <= first["slas/bound"] * (1 + 1e-6)
    assert "slas/gamma" not in second  # measured every ten updates


@pytest.mark.slow
def test_policy_gradients_explore_too(train):
    overrides = ["name=e2po_grpo", "algorithm.kind=grpo", "algorithm.clip=2e-3", *SMALL]
    run = train(load(CONFIGS / "embedded_e2po_efficient.yaml", overrides))
    assert run.summary["self_check"] == {"max_abs_log_ratio": 0.0}
    assert all(row["explore/anchor_cosine"] < 1 for row in read_jsonl(RunDir(run.path).metrics))
