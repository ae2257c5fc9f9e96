"""A node that is lost with all that is on it, and one that joins later, do not show in the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# How soon Ray takes a node for lost that refuses connections: about 3 s. One that is only slow has more time.
SOON = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.fixture(scope="module")
def runs_on_nodes(tmp_path_factory) -> dict:
    """What node_loss.py found: `quiet` and `stormy`."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ac-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | SOON
        command = [sys.executable, str(Path(__file__).parent / "node_loss.py"), folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=420)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_survives_the_loss_of_nodes_with_samplers_images_and_records(runs_on_nodes):
    quiet, stormy = runs_on_nodes["quiet"], runs_on_nodes["stormy"]
    assert stormy["workers_lost"] >= 2 and quiet["workers_lost"] == 0
    assert stormy["lost_records"] > 0
    for key in ("lora_checksum", "after", "images_drawn"):
        assert stormy[key] == quiet[key]
