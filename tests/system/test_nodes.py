"""A node that is lost with all that is on it, and one that joins later, do not show in the weights."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from align_cluster.cluster.preload import Preload

# How soon Ray takes a node for lost that refuses connections: about 3 s. One that is only slow has more time.
SOON = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "3",
}


def nodes(preload: Preload, what: str) -> dict:
    """What node_loss.py found, in a fork and with forks as workers."""
    with tempfile.TemporaryDirectory(prefix="ac-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | SOON
        command = [*preload.command, Path(__file__).parent / "node_loss.py", what, folder, preload.python]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "what", [pytest.param("loss", marks=pytest.mark.slow), pytest.param("ahead", marks=pytest.mark.exhaustive)]
)
def test_a_run_survives_the_loss_of_nodes_with_workers_images_and_records(preload, what):
    """Two runs, on nodes that come and go. One step ahead, what is drawn again needs older weights than the samplers
    hold then."""
    found = nodes(preload, what)
    quiet, stormy = found["quiet"], found["stormy"]
    assert stormy["workers_lost"] >= 2 and quiet["workers_lost"] == 0
    assert stormy["lost_images"] + stormy["redrawn"] > 0
    for key in ("lora_checksum", "after", "images_drawn"):
        assert stormy[key] == quiet[key]


@pytest.mark.exhaustive  # a run, and a weight sync to two nodes
def test_a_node_that_joins_is_used_and_the_doctor_knows_the_nodes(preload):
    """A spare sampler stays only if it has work: it waits for room in step 1, comes, and is there after step 4."""
    found = nodes(preload, "join")
    assert found["elastic"]["samplers"][3:6] == [2, 2, 2] and found["elastic"]["samplers"][0] == 1
    by_name = {check["name"].split(" (")[0]: check for check in reversed(found["doctor"])}
    assert by_name["node 0"]["state"] == by_name["node 1"]["state"] == "ok"
    assert "1 CPU, 0 GPU, object store 0.09 GiB" in by_name["node 1"]["value"]
    assert any(check["value"] == "object store of 0.09 GiB" for check in found["doctor"])
    fits, lacks = (check for check in found["doctor"] if check["name"] == "run nodes")
    assert fits["value"] == "fits: 1 samplers (up to 2), 1 learners, 1 reward workers"
    assert lacks["state"] == "fail" and "rewards ask for more CPU cores" in lacks["value"]
    assert by_name["weight sync"]["state"] == "ok" and "to samplers on 2 nodes" in by_name["weight sync"]["value"]
    assert found["lost_input"] == "InputLost"
