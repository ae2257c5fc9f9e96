import io
import re

import pytest
from rich.console import Console

from align_cluster.observe.progress import Progress, clock, table

STAGES = {"rollout": "chunks", "reward": "chunks", "update": ""}


def run(console: Console, steps: int, **options) -> str:
    with Progress(steps, STAGES, console=console, **options) as progress:
        progress.note("held-out before [0.483]")
        for step in range(1, steps + 1):
            for stage in STAGES:
                for done in (0, 1, 2):
                    progress.stage(stage, done, 2)
            progress.step(step, {"reward/geneval/mean": 0.5 + step / 100, "throughput/images_per_s": 14.2})
    return console.file.getvalue()


def test_without_a_terminal_there_is_one_plain_line_every_n_steps():
    text = run(Console(file=io.StringIO(), width=20), 10, every=4)
    lines = text.splitlines()
    assert lines[0] == "held-out before [0.483]"
    assert [line.split()[1] for line in lines[1:]] == ["1/10", "4/10", "8/10", "10/10"]
    assert "geneval 0.600 (began 0.510)" in lines[-1] and "14.2 images/s" in lines[-1]
    assert "\x1b" not in text and "━" not in text


def test_a_long_run_without_a_terminal_prints_about_twenty_lines():
    assert 20 <= len(run(Console(file=io.StringIO()), 1000).splitlines()) <= 23


def test_on_a_terminal_there_are_bars_for_the_run_and_each_stage():
    text = run(Console(file=io.StringIO(), force_terminal=True, width=120, legacy_windows=False), 3)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    last = plain[plain.rindex("steps  ") :]
    assert "3/3" in last and "ETA 0:00" in last and "geneval 0.530" in last
    assert all(stage in last for stage in STAGES)
    assert "held-out before [0.483]" in plain


def test_at_80_columns_steps_eta_units_and_rewards_are_whole():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, legacy_windows=False)
    with Progress(1000, STAGES, console=console) as progress:
        progress.stage("rollout", 0, 8)
        progress.stage("update", 0, 1)
        progress.stage("rollout", 8, 8)
        progress.step(999, {"reward/geneval/mean": 0.5, "reward/clip/mean": 0.25, "time/step": 3.0})
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    last = plain[plain.rindex("steps  ") :]
    assert "999/1000" in last and "ETA 0:03" in last and "8/8 chunks" in last and "…" not in last
    assert " 0/" not in last and last.count("chunks") == 1, "what has not begun, or has no units, has no count"
    assert "geneval 0.500 (began 0.500)  clip 0.250 (began 0.250)" in last


def test_before_the_first_stage_there_are_sentences_with_times_and_no_empty_bars(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("align_cluster.observe.progress.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), force_terminal=True, width=80, legacy_windows=False)
    with Progress(5, STAGES, console=console, began=97.0) as progress:
        progress.phase("starting Ray")
        now[0] += 62
        progress.phase("scoring the base model: 240 images")
        lines = console.file.getvalue().splitlines()
    assert [line.strip() for line in lines] == ["0:03  starting Ray", "1:05  scoring the base model: 240 images"]


def test_eta_leaves_out_what_came_before_the_first_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("align_cluster.observe.progress.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO())
    with Progress(5, STAGES, every=1, console=console) as progress:
        now[0] += 60  # workers start, the base model is evaluated
        progress.step(1, {"time/step": 2.0})
        now[0] += 4
        progress.step(2, {"time/step": 2.0})
    lines = console.file.getvalue().splitlines()
    assert "ETA 0:08" in lines[0]
    assert "ETA 0:09" in lines[1]  # 3 steps of (2 + 4) / 2 s


def test_an_undeclared_stage_is_an_error_with_and_without_a_terminal():
    for terminal in (True, False):
        progress = Progress(1, STAGES, console=Console(file=io.StringIO(), force_terminal=terminal))
        with pytest.raises(ValueError, match="rollout, reward, update"):
            progress.stage("rolout", 0, 1)


def test_clock():
    assert [clock(s) for s in (0, 59.6, 3599, 3600, 36_061)] == ["0:00", "1:00", "59:59", "1:00:00", "10:01:01"]


def test_the_final_table_says_what_changed_and_where_the_files_are(tmp_path):
    summary = {
        "headline": "reward/geneval",
        "before": {"overall": {"reward/geneval": 0.4}, "tasks": {"colors": {"reward/geneval": 0.4}}},
        "after": {"overall": {"reward/geneval": 0.55}, "tasks": {"colors": {"reward/geneval": 0.55}}},
        "images_drawn": 960,
        "images_per_s": 15.83,
        "wall_seconds": 61.0,
        "stage_seconds": {"rollout": 40.2, "update": 20.1},
        "lora_path": "runs/q/lora",
    }
    console = Console(file=io.StringIO(), width=200)
    console.print(table(summary, tmp_path))
    text = console.file.getvalue()
    for part in ("colors", "overall", "0.400", "0.550", "+0.150", "960 drawn", "15.8 images/s", "1:01", "rollout 0:40"):
        assert part in text
    assert str(tmp_path / "report.html") in text and "runs/q/lora" in text


def test_the_final_table_of_a_run_without_figures_is_empty_not_an_error():
    console = Console(file=io.StringIO())
    console.print(table({}))
    assert console.file.getvalue().strip() == ""
