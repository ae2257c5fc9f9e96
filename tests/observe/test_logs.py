import json
import logging

import pytest

from align_cluster.errors import UserError
from align_cluster.observe.progress import Progress


def test_a_run_whose_log_is_json_writes_objects_with_run_step_and_worker_and_nothing_else(monkeypatch, capsys):
    monkeypatch.setenv("ALIGN_CLUSTER_LOG", "json")
    with Progress(2, {"rollout": "chunks"}, run="tiny") as bars:
        bars.named("tiny-2")
        bars.phase("starting Ray")
        bars.stage("rollout", 0, 2)
        bars.step(1, {"reward/clip/mean": 0.5, "time/step": 1.0})
        logging.getLogger("align_cluster.cluster.pool").warning("%s was lost", "it", extra={"worker": "sampler-0"})
        bars.finish({}, "runs/tiny-2")
    logging.getLogger("align_cluster").warning("after the run")
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert all(line.keys() == {"at", "level", "run", "step", "worker", "message"} for line in lines)
    assert {line["run"] for line in lines} == {"tiny-2"} and all(line["at"] > 1e9 for line in lines)
    found = [(line["level"], line["step"], line["worker"]) for line in lines]
    assert found == [("info", 0, None), ("info", 1, None), ("warning", 1, "sampler-0"), ("info", 1, None)]
    assert lines[1]["message"].startswith("step 1/2  elapsed") and lines[2]["message"] == "it was lost"
    assert lines[0]["message"].endswith("starting Ray") and lines[3]["message"] == "done: runs/tiny-2"


def test_another_kind_of_log_is_refused_with_those_that_there_are(monkeypatch):
    monkeypatch.setenv("ALIGN_CLUSTER_LOG", "xml")
    with pytest.raises(UserError, match="ALIGN_CLUSTER_LOG is xml; set it to json or text, or unset it"):
        Progress(2, {})
