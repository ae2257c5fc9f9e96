"""Every embedded run file takes two real steps: what ships, runs. In this process, and for six of them on Ray too."""

import math
from pathlib import Path

import pytest

from align_cluster.config.check import check
from align_cluster.config.load import load
from align_cluster.config.run import RunConfig
from align_cluster.observe.metrics import describe
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import read_jsonl

from ..inprocess import assert_same_run

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = (
    *("steps=2", "prompts_per_step=2", "cluster.timeout_s=240", "backbone.lora.rank=4"),
    *("learner.updates_per_step=2", "cluster.samplers=1", "cluster.learners=1"),  # start-up is what takes time here
    *("evaluate.count=2", "evaluate.images_per_prompt=2", "evaluate.every=0", "evaluate.grid_every=0"),
    *("evaluate.grid_prompts=2", "evaluate.grid_columns=2"),
)
# Full-size run files of methods that were published for other models than Stable Diffusion 3.5.
LARGE = {"srpo": "flux_dev_srpo_hps", "refl": "flux_dev_refl", "draft": "sd15_draft", "draft_lv": "sd15_draft_lv"}
TWINS = sorted(path.stem for path in CONFIGS.glob("embedded_*.yaml"))
ADAPTIVE = ("advantage.shaping.gamma=adaptive", "learner.updates_per_step=1")
WORST = (*ADAPTIVE, "advantage.shaping.bound=worst_case", "advantage.shaping.delta=1e2")


def small(name: str, *overrides: str) -> RunConfig:
    """Two small steps of a run file, in which texts are perturbed briefly and a critic lets the actor learn at once."""
    whole = load(CONFIGS / f"{name}.yaml", [])
    most = 2 if whole.exploration else 4  # noises, each of which meets every condition
    smaller = [f"name={name}", *SMALL, f"rollout.group_size={min(whole.rollout.group_size, most)}"]
    if whole.exploration:
        smaller += ["exploration.iterations=20", f"rollout.chunk={whole.exploration.conditions}"]
    smaller += ["algorithm.warm_up.updates=0"] * (whole.algorithm.kind == "ppo")
    smaller += ["prompts_per_step=4"] * (whole.advantage.shaping is not None)  # a deviation needs four groups
    return load(CONFIGS / f"{name}.yaml", [*smaller, *overrides])


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


@pytest.mark.parametrize("name", TWINS)
def test_every_embedded_run_file_takes_two_steps(name, in_process):
    config, done = small(name), in_process(small(name))
    assert [row["step"] for row in done.rows] == [1, 2] and len(set(done.checksums)) == 3
    for row in done.rows:
        assert all(describe(key) for key in row.keys() - {"step"})
        assert math.isfinite(row["train/loss"]) and row["train/grad_norm"] >= 0
    assert done.self_check == (None if config.window is None else {"max_abs_log_ratio": 0.0})
    if config.exploration:
        assert all(-1 <= row["explore/anchor_cosine"] <= 1 for row in done.rows)
        assert all(row["group/std_across_conditions"] >= 0 for row in done.rows)
    if config.advantage.shaping:
        assert all(row["advantage/gamma"] == config.advantage.shaping.gamma for row in done.rows)


def test_the_worst_case_bound_is_measured_and_used(in_process):
    """The first step is linear, since nothing is known yet; the second uses what the first one's update measured."""
    first, second = in_process(small("embedded_slas", *WORST)).rows
    assert first["advantage/gamma"] == 0 and first["slas/lambda_max"] > 0 and first["slas/score_norm"] > 0
    assert second["advantage/gamma"] == first["slas/gamma"] > 0
    assert first["slas/moment"] <= first["slas/bound"] * (1 + 1e-6)
    assert "slas/gamma" not in second  # measured every ten updates


def test_policy_gradients_explore_too(in_process):
    done = in_process(small("embedded_e2po_efficient", "algorithm.kind=grpo", "algorithm.clip=2e-3"))
    assert done.self_check == {"max_abs_log_ratio": 0.0}
    assert all(row["explore/anchor_cosine"] < 1 for row in done.rows)


# Six runs on Ray between which every kind of algorithm, exploration, adaptive shaping, several rewards and pools of
# their own are met: (run file, overrides).
REAL = [
    (
        "embedded_e2po_efficient",
        (
            *("rewards.geneval.pool.workers=2", "rewards.clip.pool.cpus=0.02"),
            *("exploration.update=perturbed", "exploration.learned=each_time", "exploration.anchor=false"),
        ),
    ),
    ("embedded_slas", WORST),
    ("embedded_critic", ()),
    ("embedded_srpo", ()),
    ("embedded_refl", ()),
    ("embedded_draft", ()),
]
OTHERS = [(name, ()) for name in TWINS if name not in dict(REAL)]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [pytest.param(*one, marks=pytest.mark.slow) for one in REAL]
    + [pytest.param(*other, marks=pytest.mark.exhaustive) for other in OTHERS],
)
def test_a_run_on_ray_is_the_run_in_one_process_bit_by_bit(name, overrides, in_process, train):
    config = small(name, *overrides)
    run = train(config)
    assert_same_run(in_process(config), run.path)
    first, _ = read_jsonl(RunDir(run.path).metrics)  # the second one is explored in the first one's time
    assert (first.get("time/explore", 0) > 0) == bool(config.exploration)


@pytest.mark.exhaustive
def test_two_ranks_measure_the_worst_case_bound_too(train):
    run = train(small("embedded_slas", *WORST, "cluster.learners=2"))
    first, second = read_jsonl(RunDir(run.path).metrics)
    assert first["advantage/gamma"] == 0 and second["advantage/gamma"] == first["slas/gamma"] > 0
