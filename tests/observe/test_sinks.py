import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import MetricWriter, append_jsonl, read_jsonl


def test_each_step_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step, {"train/loss": step / 4, "lr": 1e-4})
            records = read_jsonl(RunDir(tmp_path).metrics)
            assert [record["step"] for record in records] == list(range(1, step + 1))
    assert records[-1] == {"step": 2, "seconds": records[-1]["seconds"], "train/loss": 0.5, "lr": 1e-4}
    assert 0 <= records[0]["seconds"] <= records[1]["seconds"]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 0.5})
        writer.write(2, {"train/loss": math.nan})
        writer.evaluation(2, 2, "base", {"overall": {"reward/clip": 0.25}, "tasks": {}, "count": 4})
    events = EventAccumulator(str(RunDir(tmp_path).tensorboard)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("held_out/reward/clip")] == [(2, 0.25)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null(tmp_path, value):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": value, "lr": 1.0})
    assert "NaN" not in (text := RunDir(tmp_path).metrics.read_text()) and "Infinity" not in text
    assert read_jsonl(RunDir(tmp_path).metrics)[0]["train/loss"] is None


def test_an_undeclared_name_is_refused_before_anything_is_written(tmp_path):
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match="not declared"):
        writer.write(1, {"train/loss": 1.0, "train/lsos": 1.0})
    assert not RunDir(tmp_path).metrics.exists()


def test_an_evaluation_keeps_its_table(tmp_path):
    scores = {"overall": {"reward/clip": 0.25}, "tasks": {"colors": {"reward/clip": 0.25}}, "count": 4}
    with MetricWriter(tmp_path) as writer:
        writer.evaluation(7, 8, "base", scores)
    assert read_jsonl(RunDir(tmp_path).evaluations) == [{"step": 7, "version": 8, "adapter": "base", **scores}]


def test_a_torn_last_line_is_left_out_by_the_reader_and_cut_off_by_the_writer(tmp_path):
    path = tmp_path / "a.jsonl"
    append_jsonl(path, {"step": 1})
    append_jsonl(path, {"step": 2})
    path.write_bytes(path.read_bytes()[:-4])
    assert read_jsonl(path) == [{"step": 1}]
    append_jsonl(path, {"step": 2, "again": True})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2, "again": True}]
    path.write_bytes(b'{"st')
    assert read_jsonl(path) == []
    append_jsonl(path, {"step": 1})
    assert read_jsonl(path) == [{"step": 1}]


def test_damage_before_the_last_line_is_not_hidden(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(json.JSONDecodeError):
        read_jsonl(path)


def test_a_missing_file_has_no_records(tmp_path):
    assert read_jsonl(tmp_path / "none.jsonl") == []
