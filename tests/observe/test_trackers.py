"""Trackers: the machinery that keeps them from disturbing a run, and the real ones in their offline modes."""

import importlib.util
import json
import math
import threading
from pathlib import Path

import pytest

from align_cluster.config.check import check
from align_cluster.config.load import load
from align_cluster.errors import UserError
from align_cluster.observe.metrics import declared
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import MetricWriter, earlier, read_jsonl
from align_cluster.observe.trackers import TRACKERS, feed
from align_cluster.observe.trackers.base import TrackedRun, Tracker, TrackerSection, Values
from align_cluster.observe.trackers.feed import Feed
from align_cluster.observe.trackers.prometheus import Prometheus, series

TINY = Path(__file__).parents[1] / "system/tiny.yaml"


class Recorder(Tracker):
    """Keeps what it is given; `held` makes it wait, and `faults` are what it raises, by step."""

    Config = TrackerSection

    def __init__(self, held: threading.Event | None = None, faults: dict[int, str] | None = None) -> None:
        self.held, self.faults, self.rows, self.ended = held, faults or {}, [], None

    def open(self, run: TrackedRun) -> bool:
        if -1 in self.faults:
            raise ConnectionError(self.faults[-1])
        return True

    def write(self, step: int, values: Values) -> None:
        if self.held:
            self.held.wait()
        if step in self.faults:
            raise OSError(self.faults[step])
        self.rows.append((step, values))

    def close(self, failed: bool) -> None:
        self.ended = failed


def fed(tracker: Tracker, folder: Path, notes: list[str], rows=()) -> Feed:
    return Feed("recorder", tracker, TrackedRun(folder), rows, notes.append)


def test_a_tracker_gets_every_step_and_evaluation_under_the_names_of_the_files(tmp_path):
    tracker, notes = Recorder(), []
    with MetricWriter(tmp_path, feeds=[fed(tracker, tmp_path, notes)]) as writer:
        writer.evaluation(0, 0, "base", {"overall": {"reward/clip": 0.25}})
        writer.write(1, {"train/loss": 0.5, "lr": math.nan})
        writer.live(1, {"run/step": 1.0})
    assert [row for row in tracker.rows if row[0] == 0] == [(0, {"held_out/reward/clip": 0.25})]
    step, values = tracker.rows[-1]
    assert step == 1 and values["train/loss"] == 0.5 and math.isnan(values["lr"]) and len(tracker.rows) == 2
    assert tracker.ended is False and not notes


def test_a_tracker_that_hangs_stops_no_step_and_what_it_lacks_is_told_once_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "MOST", 5)
    monkeypatch.setattr(feed, "CLOSE_S", 0.1)
    held, notes = threading.Event(), []
    tracker = Recorder(held)
    try:
        with MetricWriter(tmp_path, feeds=[fed(tracker, tmp_path, notes)]) as writer:
            for step in range(1, 21):
                writer.write(step, {"train/loss": 0.5})
        assert len(read_jsonl(RunDir(tmp_path).metrics)) == 20
        assert notes[0] == "track: recorder is 5 rows behind; the run goes on, and metrics.jsonl has every step"
        end = "did not finish in time and lacks 20 rows of this run; metrics.jsonl has every step"
        assert notes[1:] == [f"track: recorder {end}"]
    finally:
        held.set()


def test_a_tracker_that_fails_at_some_steps_gets_the_others(tmp_path):
    tracker, notes = Recorder(faults={2: "no route\nto host", 4: "again"}), []
    with MetricWriter(tmp_path, feeds=[fed(tracker, tmp_path, notes)]) as writer:
        for step in range(1, 6):
            writer.write(step, {"train/loss": 0.5})
    assert [step for step, _ in tracker.rows] == [1, 3, 5]
    assert notes == [
        "track: recorder fails (no route); the run goes on, and metrics.jsonl has every step",
        "track: recorder lacks 2 rows of this run; metrics.jsonl has every step",
    ]


def test_a_tracker_that_cannot_be_opened_is_told_once_and_the_run_goes_on(tmp_path):
    tracker, notes = Recorder(faults={-1: "no login"}), []
    with MetricWriter(tmp_path, feeds=[fed(tracker, tmp_path, notes)]) as writer:
        for step in range(1, 4):
            writer.write(step, {"train/loss": 0.5})
    assert not tracker.rows and len(read_jsonl(RunDir(tmp_path).metrics)) == 3
    assert notes == [
        "track: recorder cannot be used (no login); the run goes on, and metrics.jsonl has every step",
        "track: recorder lacks 3 rows of this run; metrics.jsonl has every step",
    ]


def test_a_tracker_learns_that_the_run_failed(tmp_path):
    tracker = Recorder()
    with pytest.raises(UserError), MetricWriter(tmp_path, feeds=[fed(tracker, tmp_path, [])]):
        raise UserError("stopped")
    assert tracker.ended is True


def test_a_tracker_that_is_new_to_a_resumed_run_gets_the_earlier_steps_first(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.evaluation(0, 0, "base", {"overall": {"reward/clip": 0.25}})
        writer.write(1, {"train/loss": 0.5, "lr": math.inf})
    tracker = Recorder()
    with MetricWriter(tmp_path, 1, feeds=[fed(tracker, tmp_path, [], earlier(RunDir(tmp_path)))]) as writer:
        writer.write(2, {"train/loss": 0.25})
    assert tracker.rows == [(0, {"held_out/reward/clip": 0.25}), (1, {"train/loss": 0.5}), (2, {"train/loss": 0.25})]


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_tracker_without_its_package_is_refused_with_the_command_that_installs_it(kind, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load(TINY, [f"track=[{{kind: {kind}}}]"])
    with pytest.raises(UserError) as refused:
        check(config)
    problem = str(refused.value)
    assert problem.startswith(f"track.0.kind is {kind}, and") and f"pip install 'align-cluster[{kind}]'" in problem


def test_two_trackers_of_one_kind_are_refused():
    with pytest.raises(UserError, match="track is .*; it must be a list with each kind once"):
        load(TINY, ["track=[{kind: prometheus}, {kind: prometheus}]"])


class Gauges:
    """Stands where Ray's exporter is: the last values of each series."""

    def __init__(self) -> None:
        self.labels: dict[str, tuple[str, ...]] = {}
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def make(self, name: str, meaning: str, labels: tuple[str, ...]):
        assert meaning and name not in self.labels
        self.labels[name] = labels

        def put(value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == labels
            self.values[name, tuple(tags.items())] = value

        return put

    def take(self) -> dict[str, float]:
        """What was set since the last call: `name{label}` without the label of the run."""
        found = {f"{name}{[value for _, value in tags[1:]]}": value for (name, tags), value in self.values.items()}
        self.values.clear()
        return found


def test_prometheus_shows_what_is_known_again_with_every_row_and_forgets_what_a_step_lacks(tmp_path):
    gauges = Gauges()
    tracker = Prometheus(Prometheus.Config())
    file = RunDir(tmp_path).prometheus
    assert not tracker.open(TrackedRun(tmp_path, {}, ("clip",), gauges.make, lambda: ["127.0.0.1:1"]))
    assert json.loads(file.read_text()) == [{"labels": {"job": "ray"}, "targets": ["127.0.0.1:1"]}]
    tracker.write(1, {"reward/clip/mean": 0.5, "time/update": 2.0, "rollout/non_finite": 1.0, "lr": math.nan})
    name = "align_cluster_"
    assert gauges.take() == {
        f"{name}reward_mean['clip']": 0.5,
        f"{name}time_by_stage['update']": 2.0,
        f"{name}rollout_non_finite_total[]": 1.0,
        f"{name}reward_failed_total['clip']": 0.0,
    }
    tracker.write(2, {"reward/clip/failed": 3.0, "reward/clip/failed/timeout": 3.0, "rollout/non_finite": 1.0})
    tracker.write(2, {"workers/reward shared/lost": 1.0})
    assert gauges.take() == {
        f"{name}time_by_stage['update']": 2.0,
        f"{name}rollout_non_finite_total[]": 2.0,
        f"{name}reward_failed_total['clip']": 3.0,
        f"{name}reward_failed_by_kind_total['clip', 'timeout']": 3.0,
        f"{name}workers_lost['reward shared']": 1.0,
    }
    tracker.close(False)
    assert not file.exists()


def test_every_declared_metric_has_a_name_of_its_own_in_prometheus():
    patterns = {metric.pattern for metric in declared()}
    assert len({series(pattern)[0] for pattern in patterns}) == len(patterns)
    assert all(name.replace("_", "").isalnum() for name in (series(pattern)[0] for pattern in patterns))


def follow(kind: str, settings: dict, folder: Path, steps: range) -> list[str]:
    """Write some steps as a run does, and return what was noted."""
    notes: list[str] = []
    tracker = TRACKERS[kind](TRACKERS[kind].Config(**settings))
    run = TrackedRun(folder, {"steps": 4, "optimizer.lr": 1e-4, "name": "tracked"})
    one = Feed(kind, tracker, run, earlier(RunDir(folder)), notes.append)
    with MetricWriter(folder, steps.start - 1 or None, notes.append, [one]) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 1 / step, "lr": math.nan, "reward/clip/a task+": 0.25})
    return notes


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed: the extra wandb")
def test_weights_and_biases_offline_has_the_steps_and_goes_on_in_the_same_run(tmp_path):
    for steps in (range(1, 3), range(3, 5)):
        assert not follow("wandb", {"mode": "offline"}, tmp_path / "tracked", steps)
    folder = tmp_path / "tracked/trackers/wandb"
    name = json.loads((folder / "run.json").read_text())["id"]
    files = sorted(folder.rglob(f"run-{name}.wandb"))
    assert len(files) == 2
    texts = [file.read_bytes() for file in files]
    assert all(b"train/loss" in text and b"reward/clip/a task+" in text and b"optimizer.lr" in text for text in texts)


@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="mlflow is not installed: the extra mlflow")
def test_mlflow_has_the_steps_and_settings_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for steps in (range(1, 3), range(3, 5)):
        assert not follow("mlflow", {}, tmp_path / "tracked", steps)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("align-cluster").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.run_name == "tracked" and run.info.status == "FINISHED"
    assert run.data.params == {"steps": "4", "optimizer.lr": "0.0001", "name": "tracked"}
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in losses] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert run.data.metrics.keys() == {"train/loss", "reward/clip/a task_"}
