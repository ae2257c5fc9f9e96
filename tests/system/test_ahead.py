"""One step ahead: the samplers draw the next step while the learner trains, and nothing shows of who was quicker."""

import json
import os
import signal
import threading
from itertools import pairwise

import pytest

from align_cluster.cluster.run_status import examine_run
from align_cluster.errors import Preempted, UserError
from align_cluster.files import read_json
from align_cluster.loop import driver
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import read_jsonl

from ..inprocess import assert_same_run
from .test_resume import assert_no_seam, preempting, sigterm  # noqa: F401 - a fixture
from .test_same_weights import MOMENTS, saboteur

AHEAD = ("loop.ahead=1", "steps=4", "evaluate.every=3", "evaluate.grid_every=0", "checkpoint.every=2")
ONE = ("cluster.samplers=1", "cluster.learners=1")
CRITIC = ("algorithm.critic.width=32", "algorithm.critic.heads=4", "algorithm.warm_up.updates=2", "prompts_per_step=4")
EXPLORE = (
    *("exploration.kind=e2po", "exploration.conditions=2", "exploration.iterations=3", "exploration.update=perturbed"),
    *("exploration.learned=each_time", "rollout.chunk=8", "cluster.condition_cache_gib=1e-9", "rollout.guidance=2"),
)
KINDS = {"grpo": ("grpo",), "nft": ("nft",), "ppo": ("ppo", *CRITIC), "e2po": ("nft", *EXPLORE)}


@pytest.fixture(scope="module")
def undisturbed(tiny, train):
    """Function kind -> its run with one sampler and one learner, run once."""
    runs = {}

    def go(kind):
        if kind not in runs:
            runs[kind] = train(tiny(*KINDS[kind], *AHEAD, *ONE))
        return runs[kind]

    return go


@pytest.mark.parametrize(
    ("kind", "staleness"),
    [
        ("grpo", [0, 1, 1, 1]),
        pytest.param("nft", [0, 1, 1, 1], marks=pytest.mark.exhaustive),
        # While only the critic learns, the weights that draw stay what they are.
        pytest.param("ppo", [0, 0, 0, 1], marks=pytest.mark.slow),
        pytest.param("e2po", [0, 1, 1, 1], marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_one_step_ahead_is_a_plain_loop_that_draws_with_the_weights_of_one_update_before(
    kind, staleness, tiny, undisturbed, in_process
):
    here, run = in_process(tiny(*KINDS[kind], *AHEAD, *ONE)), undisturbed(kind)
    assert [row["staleness"] for row in here.rows] == staleness
    assert_same_run(here, run.path)
    for row in here.rows if kind != "e2po" and kind != "nft" else ():
        first, stale = row.get("train/first_log_ratio_max"), row.get("train/stale_log_ratio_max")
        assert first == (0 if stale is None and row.get("value/actor", 1) else None) and (stale is None or stale > 0)


def test_every_step_says_who_waited_and_the_run_keeps_the_last_steps_timeline(undisturbed):
    run = RunDir(undisturbed("grpo").path)
    rows, timeline = read_jsonl(run.metrics), read_json(run.timeline)
    assert all(0 <= row[f"idle/{pool}"] <= 1 for row in rows for pool in ("samplers", "learners", "rewards"))
    assert rows[-1]["idle/samplers"] > 0.9  # nothing is left to draw while the last step is trained
    assert timeline["step"] == 4 and {lane["pool"] for lane in timeline["workers"]} >= {"learners"}
    for lane in timeline["workers"]:
        ends = [0.0, *(time for _, *span in lane["spans"] for time in span), timeline["seconds"] + 0.01]
        assert all(first <= second for first, second in pairwise(ends))
    assert "who worked when in step 4" in run.report.read_text()
    waited = next(check for check in examine_run(run.path) if check.name == "waited in the last step")
    assert waited.state == "ok" and "samplers" in waited.value and "learners" in waited.value


@pytest.mark.parametrize(
    ("kind", "samplers", "pool"),
    [
        pytest.param("grpo", 2, "samplers", marks=pytest.mark.slow),
        pytest.param("grpo", 3, "rewards", marks=pytest.mark.exhaustive),
        pytest.param("nft", 3, "samplers", marks=pytest.mark.exhaustive),
    ],
)
def test_any_number_of_samplers_and_workers_killed_at_any_moment_change_nothing(
    undisturbed, tiny, train, pid_of, monkeypatch, kind, samplers, pool
):
    """A rank of the learner dies too, in the middle of an update, while the samplers draw the step after it."""
    quiet, killed, ranks = undisturbed(kind), [], []

    class Saboteur(saboteur(pool, MOMENTS, pid_of, killed)):
        def update(self, step, *args):
            if step == 2:
                ranks.append(pid_of(self.ranks.ranks[0]))
                threading.Timer(0.1, os.kill, [ranks[0], signal.SIGKILL]).start()  # an update takes longer than that
            return super().update(step, *args)

    monkeypatch.setattr(driver, "WorkerGroup", Saboteur)
    run = train(tiny(*KINDS[kind], *AHEAD, f"cluster.samplers={samplers}", "cluster.learners=1"))
    assert len(killed) == len(MOMENTS) and len(ranks) == 1
    for key in ("lora_checksum", "before", "after", "images_drawn", "config_hash"):
        assert run.summary[key] == quiet.summary[key]


@pytest.mark.parametrize(
    ("kind", "moment", "at"),
    [
        pytest.param("grpo", "before update", 2, marks=pytest.mark.slow),
        pytest.param("grpo", "rollout", 2, marks=pytest.mark.exhaustive),
        pytest.param("nft", "publish evaluation", 2, marks=pytest.mark.exhaustive),
        pytest.param("ppo", "after update", 2, marks=pytest.mark.exhaustive),
        pytest.param("nft", "before update", 0, marks=pytest.mark.exhaustive),
    ],
)
def test_sigterm_at_any_moment_saves_and_the_resumed_run_draws_with_the_weights_of_one_step_before(
    undisturbed,
    tiny,
    tmp_path,
    monkeypatch,
    sigterm,  # noqa: F811
    kind,
    moment,
    at,
):
    config = tiny(*KINDS[kind], *AHEAD, *ONE)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "WorkerGroup", preempting(moment, at))
        with pytest.raises(Preempted):
            driver.train(config, tmp_path)
    if at:
        with pytest.raises(UserError, match="loop.ahead: 1 there, 0 here"):
            driver.train(tiny(*KINDS[kind], *AHEAD, *ONE, "loop.ahead=0"), tmp_path, "auto")
    path = driver.train(config, tmp_path, "auto")
    assert json.loads(RunDir(path).summary.read_text())["resumed"] == (1 if at else 0)
    assert_no_seam(path, undisturbed(kind).path)


@pytest.mark.slow
def test_after_a_rollback_the_step_that_the_collapsed_weights_drew_is_drawn_anew(tiny, train):
    """The limit is broken as soon as there are five norms to compare with, after step 6. Step 7 is then drawn with the
    weights that are taken back: its log-probs are the learner's."""
    rule = "guard.grad_norm={limit: 1.0e-6, patience: 1, action: rollback}"
    kept = ("steps=8", "checkpoint.every=2", "evaluate.grid_every=0", "guard.rollbacks=9", "loop.ahead=1")
    path = train(tiny("grpo", rule, *kept, *ONE, "evaluate.images_per_prompt=1")).path
    rows = read_jsonl(RunDir(path).metrics)
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1, 1, 1, 0, 1]
    assert rows[6]["train/first_log_ratio_max"] == 0
    steps = json.loads(RunDir(path).summary.read_text())["images_drawn"] - 2 * 2  # before and after the run
    assert steps - 2 * 4 == 9 * 8  # eight steps, and the one that was drawn anew, of eight images; grids of four
