import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import chaos
import pytest
from chaos import AT_ONCE, KILLS, MOMENTS, accounts, schedule, step_seconds, table

from align_cluster.observe.sinks import append_jsonl

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


def test_a_schedule_is_its_seeds_and_has_at_least_fifty_kills_of_all_kinds_at_all_moments():
    kills = schedule(0, 30, KILLS)
    assert kills == schedule(0, 30, KILLS) != schedule(1, 30, KILLS)
    assert len(kills) >= 50 and Counter(kill.kind for kill in kills) == KILLS
    assert {kill.moment for kill in kills} == set(MOMENTS)
    assert [kill.id for kill in kills] == list(range(len(kills)))
    for step in range(1, 31):
        here = [kill for kill in kills if kill.step == step]
        assert len({kill.kind for kill in here}) <= 1 and len({kill.moment for kill in here}) == len(here)
        assert all(len(here) <= AT_ONCE[kill.kind] for kill in here)


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 steps are needed"):
        schedule(0, 2, {"driver": 3})


def run_of(folder: Path, steps: list[int], drawn: list[tuple[int, list[int]]]) -> None:
    for step in steps:
        append_jsonl(folder / "chaos" / "metrics.jsonl", {"step": step})
    for step, groups in drawn:
        append_jsonl(folder / "drawn.jsonl", {"step": step, "chunks": [[step - 1, group, 0] for group in groups]})


def test_lost_doubled_and_repeated_steps_and_groups_are_counted(tmp_path):
    for name in ("quiet", "stormy", "bad"):
        (tmp_path / name / "chaos").mkdir(parents=True)
    run_of(tmp_path / "quiet", [1, 2, 3], [(1, [0, 1]), (2, [0, 1]), (3, [0, 1])])
    run_of(tmp_path / "stormy", [1, 2, 3], [(1, [0, 1]), (2, [0, 1]), (2, [0, 1]), (3, [0, 1])])
    assert accounts(tmp_path) == {
        "steps_lost": 0,
        "steps_doubled": 0,
        "groups_lost": 0,
        "groups_doubled": 0,
        "repeated_steps": 1,
    }
    run_of(tmp_path / "bad", [1, 1, 3], [(1, [0, 0]), (3, [0, 1])])
    (tmp_path / "stormy").rename(tmp_path / "good")
    (tmp_path / "bad").rename(tmp_path / "stormy")
    found = accounts(tmp_path)
    assert (found["steps_lost"], found["steps_doubled"]) == (1, 1)
    assert (found["groups_lost"], found["groups_doubled"]) == (3, 1)


def test_a_step_lasts_from_the_end_of_the_one_before(tmp_path):
    for step, at in ((1, 10.0), (2, 12.0), (3, 19.0), (3, 20.0)):
        append_jsonl(tmp_path / "published.jsonl", {"step": step, "at": at})
    assert step_seconds(tmp_path) == {2: 2.0, 3: 8.0}


def test_the_kept_run_lost_nothing():
    if not chaos.RESULTS.exists():
        pytest.skip("no run has been kept yet")
    kept = json.loads(chaos.RESULTS.read_text())
    assert kept["kills"] >= 50 and kept["weights_equal"] and kept["held_out_equal"]
    assert kept["steps_lost"] == kept["steps_doubled"] == kept["groups_lost"] == kept["groups_doubled"] == 0
    assert "| steps lost, doubled | 0, 0 |" in list(table(kept))


@pytest.mark.exhaustive
@pytest.mark.parametrize("ahead", ["0", "1"])
def test_a_short_storm_ends_as_the_quiet_run(ahead):
    kills = ["sampler=2", "reward=1", "learner=1", "driver=1"]
    command = [sys.executable, str(SCRIPT), "run", "--steps", "4", "--ahead", ahead, "--kills", *kills]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| final LoRA equal to the quiet run's, bit by bit | yes |" in done.stdout
