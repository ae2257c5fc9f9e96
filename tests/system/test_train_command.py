"""`align-cluster train` as people start it: a Ray of its own, the table at the end, Ctrl-C."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Folder of the run and of its Ray. Its path stands in the environment of every process that the run starts."""
    folder = Path(tempfile.mkdtemp(prefix="ac-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, steps: int) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    (folder / "tmp").mkdir()
    env |= {"RAY_TMPDIR": str(folder), "ALIGN_CLUSTER_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}
    command = [sys.executable, "-m", "align_cluster.cli", "train", "tests/system/tiny.yaml"]
    command += ["--name", "one", "--out", str(folder / "runs"), "--set", f"steps={steps}"]
    with (folder / "stderr").open("w") as errors:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            # A background job of a shell is started with SIGINT ignored, and hands that on to all its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def left_behind(folder: Path, patience_s: float = 15.0) -> list[str]:
    """Commands of processes that still run with the folder in their environment."""
    deadline = time.monotonic() + patience_s
    while found := [text for process in _processes(str(folder).encode()) if (text := _command(process))]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return found


def _processes(mark: bytes) -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone in the meantime, or another user's
            if mark in (process / "environ").read_bytes():
                yield process


def _command(process: Path) -> str:
    with suppress(OSError):
        return (process / "cmdline").read_text().replace("\0", " ").strip()
    return ""


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")


@needs_proc
@pytest.mark.exhaustive
def test_the_command_succeeds_prints_its_table_and_leaves_no_process(folder):
    process = start(folder, steps=1)
    printed, _ = process.communicate(timeout=300)
    errors = (folder / "stderr").read_text()
    assert process.returncode == 0, errors
    assert "Traceback" not in printed + errors
    for text in ("learner ranks", "step 1/1", "before", "overall"):
        assert text in printed
    assert f"{folder}/runs/one/report.html" in printed
    assert (folder / "runs" / "one" / "report.html").exists()
    assert not left_behind(folder) and not list((folder / "tmp").glob("ac-*"))


@needs_proc
@pytest.mark.slow
def test_ctrl_c_however_often_ends_the_run_with_130_and_leaves_no_process(folder):
    process = start(folder, steps=1000)
    try:
        assert any(line.startswith("step 1/") for line in process.stdout)
        began = time.monotonic()
        for _ in range(3):  # an impatient user
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the command and to all that it started
            time.sleep(0.3)
        process.communicate(timeout=60)
        assert process.returncode == 130
        assert time.monotonic() - began < 30
    finally:
        process.kill()
    *late, last = (folder / "stderr").read_text().splitlines()
    assert last == "interrupted" and all("waits for" in line for line in late)  # a busy machine starts workers late
    assert not left_behind(folder) and not list((folder / "tmp").glob("ac-*"))
    assert (folder / "runs" / "one" / "metrics.jsonl").read_text().startswith('{"step": 1,')


@needs_proc
@pytest.mark.slow
def test_a_command_that_is_killed_leaves_no_worker_and_nothing_that_workers_were_forked_from(folder):
    process = start(folder, steps=1000)
    try:
        assert any(" samplers" in line for line in process.stdout)  # workers are starting
    finally:
        process.kill()
    process.wait()
    assert set(left_behind(folder)) <= {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}, "Ray leaves these behind"
    assert not list((folder / "tmp").glob("ac-*"))
    for agent in _processes(str(folder).encode()):
        os.kill(int(agent.name), signal.SIGKILL)
