import json
import math
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from align_cluster.files import write_text
from align_cluster.observe.grids import save_grid
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import MetricWriter, append_jsonl, read_jsonl

from .mounts import in_mount, needs_mounts


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


def test_a_number_that_is_not_finite_is_null(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step, value in enumerate((math.nan, math.inf, -math.inf), start=1):
            writer.write(step, {"train/loss": value, "lr": 1.0})
    assert "NaN" not in (text := RunDir(tmp_path).metrics.read_text()) and "Infinity" not in text
    assert [(row["train/loss"], row["lr"]) for row in read_jsonl(RunDir(tmp_path).metrics)] == [(None, 1.0)] * 3


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


def test_a_resumed_writer_counts_seconds_on_and_tensorboard_forgets_the_steps_that_come_again(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.start -= 100
        for step in (1, 2, 3):
            writer.write(step, {"train/loss": float(step)})
    lines = RunDir(tmp_path).metrics.read_text().splitlines(keepends=True)
    RunDir(tmp_path).metrics.write_text("".join(lines[:2]))
    time.sleep(1)  # TensorBoard reads files in the order of the seconds in their names, as runs come one after another
    with MetricWriter(tmp_path, done=2) as writer:
        for step in (3, 4):
            writer.write(step, {"train/loss": 10.0 * step})
    records = read_jsonl(RunDir(tmp_path).metrics)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert 100 <= records[0]["seconds"] <= records[1]["seconds"] <= records[2]["seconds"] < 200
    events = EventAccumulator(str(RunDir(tmp_path).tensorboard)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 30), (4, 40)]


def test_where_the_events_are_gone_tensorboard_is_written_again_from_the_rows(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.evaluation(0, 0, "base", {"overall": {"reward/clip": 0.25}, "tasks": {}, "count": 4})
        writer.write(1, {"train/loss": 1.0, "lr": math.nan})
    shutil.rmtree(RunDir(tmp_path).tensorboard)
    with MetricWriter(tmp_path, done=1) as writer:
        writer.write(2, {"train/loss": 2.0})
    events = EventAccumulator(str(RunDir(tmp_path).tensorboard)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0)]
    assert [event.step for event in events.Scalars("held_out/reward/clip")] == [0]


def test_tensorboard_shows_settings_and_grids_and_they_come_again_where_the_events_are_gone(tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run = RunDir(tmp_path)
    run.grids.mkdir()
    write_text(run.config, "name: job\nalgorithm:\n  kind: nft\n  beta: 0.5\nlayers: [1, 2]\nseed: null\n")

    def shown():
        """The settings as text and as hyperparameters, and the size of the grid by its step."""
        events = EventAccumulator(str(run.tensorboard)).Reload()
        (text,) = events.Tensors("settings/text_summary")
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        values = HParamsPluginData.FromString(content).session_start_info.hparams
        named = {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}
        return text.tensor_proto.string_val[0], named, {e.step: (e.width, e.height) for e in events.Images("grid")}

    with MetricWriter(tmp_path) as writer:
        for step in (0, 2):
            save_grid(np.zeros((2, 64, 64, 3), np.uint8), 2, run.grid(step))
            writer.grid(step)
    text, named, grids = shown()
    assert text == b"```yaml\n%s\n```" % run.config.read_bytes()
    assert named == {"name": "job", "algorithm.kind": "nft", "algorithm.beta": 0.5, "layers": "[1, 2]"}
    with Image.open(run.grid(2)) as image:
        assert grids == {0: image.size, 2: image.size}
    shutil.rmtree(run.tensorboard)
    with MetricWriter(tmp_path, done=2):
        pass
    assert shown() == (text, named, grids)


def test_a_mark_gives_the_files_as_they_stood(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"lr": 1.0})
        content = writer.mark()
        writer.write(2, {"lr": 2.0})
    assert content() == {
        "metrics.jsonl": RunDir(tmp_path).metrics.read_bytes().splitlines(keepends=True)[0],
        "evaluations.jsonl": b"",
    }


FULL = """
from pathlib import Path
from align_cluster.observe.sinks import MetricWriter, read_jsonl
folder = Path({folder!r})
writer = MetricWriter(folder)
writer.write(1, {{"lr": 1.0}})
fill = folder / "fill"
with fill.open("wb", buffering=0) as file:
    try:
        while True:
            file.write(b"x" * 4096)
    except OSError:
        pass
for step in range(2, 200):
    writer.write(step, {{"lr": float(step), "train/loss": 0.5, "train/kl": 0.25}})
mark = writer.mark()
fill.unlink()
assert len(read_jsonl(writer.files.metrics)) < 199, "the disk was not full"
writer.write(200, {{"lr": 200.0}})
writer.close()
assert [row["step"] for row in read_jsonl(writer.files.metrics)] == list(range(1, 201))
assert mark()["metrics.jsonl"].count(b"\\n") == 199
"""


@needs_mounts
def test_a_full_disk_loses_no_line_and_says_so_once(tmp_path):
    """On a disk of 300 kB that is really full, and then is not."""
    printed = in_mount(tmp_path, "mount -t tmpfs -o size=300k tmpfs {0}", FULL.format(folder=str(tmp_path)))
    assert printed.count("cannot be written (No space left on device)") == 1
    assert "held in memory and written once there is room" in printed
