"""The Ray that a run starts on its own machine: who reaches it, who reads its token, what if it is late or dies."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hooked import HookedWorkers

from align_cluster.cluster import private
from align_cluster.errors import UserError
from align_cluster.loop import driver

TINY = Path(__file__).with_name("tiny.yaml")


def listening() -> dict[tuple[int, str], set[str]]:
    """Addresses that this process, and all that came of it, listen at, by the processes' ids and names."""
    mine = {child.pid: child.name() for child in psutil.Process().children(recursive=True) if child.is_running()}
    mine[os.getpid()] = psutil.Process().name()
    found: dict[tuple[int, str], set[str]] = {}
    for one in psutil.net_connections("inet"):
        if one.status == psutil.CONN_LISTEN and one.pid in mine:
            found.setdefault((one.pid, mine[one.pid]), set()).add(one.laddr.ip.removeprefix("::ffff:"))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads other processes' sockets")
def test_a_run_of_this_machine_listens_on_loopback_only(tiny, tmp_path, local_ray, monkeypatch):
    seen = []

    class Watched(HookedWorkers):
        def update(self, *args):
            learners = {int(location.rpartition(" ")[2]) for location in self.ranks.locations}
            seen.append((listening(), learners))
            return super().update(*args)

    monkeypatch.setattr(driver, "WorkerGroup", Watched)
    driver.train(tiny("nft", "steps=1", "cluster.learners=2"), tmp_path)
    [(found, learners)] = seen
    names = dict(found.keys())
    assert len(learners) == 2 and learners < names.keys() and {"gcs_server", "raylet"} <= set(names.values())
    assert set.union(*found.values()) == {"127.0.0.1"}, found


def test_the_token_is_for_this_user_alone_and_one_that_others_can_read_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    private.make_token()
    file = tmp_path / ".ray" / "auth_token"
    token = file.read_text()
    assert len(token) == 64 and [path.name for path in file.parent.iterdir()] == ["auth_token"]

    def modes() -> list[int]:
        return [stat.S_IMODE(path.stat().st_mode) for path in (file.parent, file)]

    assert modes() == [0o700, 0o600]
    file.chmod(0o644)
    file.parent.chmod(0o755)
    private.make_token()
    assert modes() == [0o700, 0o600] and file.read_text() == token
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "a file" / "token"))
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match="Ray's token must be readable for you alone"):
        private.make_token()


FAILING = """
from align_cluster.cluster import private
import ray
import ray._private.services as services
from align_cluster.errors import UserError

tries, real = [], services.get_node

def get_node(*arguments):
    tries.append(arguments)
    if len(tries) <= {failures}:
        raise Exception("The current node timed out during startup.")  # as Ray does, with all its processes running
    return real(*arguments)

services.get_node = get_node
try:
    private.start(num_cpus=1, log_to_driver=False, _temp_dir="{folder}")
    print(len(tries), ray.cluster_resources()["CPU"])
except UserError as error:
    print(len(tries), error)
print(sum("gcs_server" in process.name() for process in private._children()))
"""


@pytest.mark.exhaustive
def test_a_ray_that_is_late_is_started_again_and_leaves_no_processes(tmp_path):
    """On a busy machine its processes are not up in the half minute that Ray gives them."""
    run = [sys.executable, "-c", FAILING.format(failures=1, folder=f"/tmp/ac-{os.getpid()}")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines() == ["2 1.0", "1"]
    assert "Ray did not start in time: the load is" in done.stderr
    run = [sys.executable, "-c", FAILING.format(failures=9, folder=f"/tmp/ac-{os.getpid()}")]
    said, left = subprocess.run(run, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines()
    assert said.startswith("3 cluster.address: a Ray on this machine did not start in 3 tries (The current node timed")
    assert left == "0"


@pytest.mark.slow
def test_a_raylet_that_is_killed_ends_the_run_with_one_sentence(tmp_path):
    command = [sys.executable, "-m", "align_cluster.cli", "train", str(TINY), "--out", str(tmp_path), "--name", "one"]
    process = subprocess.Popen(
        [*command, "--set", "steps=1000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while not (tmp_path / "one" / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.1)
        raylet = next(child for child in psutil.Process(process.pid).children() if child.name() == "raylet")
        raylet.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2, errors
    assert "state-dump" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("error: Ray's raylet on this machine has died (signal 9), and the run with it")
