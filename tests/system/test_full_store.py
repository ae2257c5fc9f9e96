"""An object store that is full, on a disk that is full, is one sentence, whoever meets it."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, tempfile
from align_cluster.cluster.placement import cluster
from align_cluster.cluster.pool import Pool, stream
from align_cluster.config.run import ClusterConfig
import numpy as np
import ray

class Painter:
    def paint(self, count):
        return "painted", np.zeros(count, np.uint8)
    def look(self, images):
        return int(images.sum())

def work():
    if sys.argv[1] == "driver":
        return [ray.put(np.ones(30_000_000, np.uint8)) for _ in range(4)]
    actor, kept = ray.remote(Painter).options(num_cpus=0), []
    first, second = (Pool(name, lambda name, index: actor.remote(), 1, 60.0) for name in ("painter", "judge"))
    for number in range(4):
        first.submit(number, "paint", 30_000_000, returns=2)
    for done in stream(first, second):
        if done.pool is first:
            kept += done.refs
            second.submit(done.key, "look", done.refs[0])

with tempfile.TemporaryDirectory(prefix="ac-", dir="/tmp", ignore_cleanup_errors=True) as folder:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error",
             object_store_memory=80_000_000, _temp_dir=folder, _system_config={"local_fs_capacity_threshold": 0.0001})
    try:
        with cluster(ClusterConfig()):
            work()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    ray.shutdown()
"""


@pytest.mark.parametrize("who", ["driver", "workers"])
@pytest.mark.exhaustive
def test_a_full_store_on_a_full_disk_is_one_sentence(who):
    done = subprocess.run([sys.executable, "-c", SCRIPT, who], capture_output=True, text=True, timeout=120)
    said = done.stdout.strip().splitlines()[-1]
    assert said.startswith("UserError: Ray's object store is full, and so is the disk that it spills to: free"), done
