"""Jobs on a real cluster: `ray start --head` with dashboard and token authentication, and `align-cluster submit`."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import venv
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from align_cluster.observe.sinks import read_jsonl

ROOT = Path(__file__).parents[2]
TINY = [
    "steps=1",
    "prompts_per_step=2",
    "learner.updates_per_step=1",
    "rollout.group_size=2",
    "rollout.steps=2",
    "algorithm.timesteps=1",
]
TINY += ["evaluate.count=3", "evaluate.images_per_prompt=1", "evaluate.grid_prompts=1", "cluster.timeout_s=120"]
PORTS = ("ray-client-server", "dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "node-manager")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def started(python, **variables):
    """(dashboard address, environment of its clients) of a cluster of two cores, whose Python is `python`; stopped by
    its own handle. `variables` are those of its nodes and of its clients; None leaves one out."""
    folder = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))  # Ray's sockets need a short path
    (folder / "token").write_text("0123456789abcdef" * 4)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {
        "PATH": f"{Path(python).parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_AUTH_MODE": "token",
    }
    nodes = {name: value for name, value in (env | variables).items() if value is not None}
    port, dashboard, *others = free_ports(2 + len(PORTS))
    command = [str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [
        f"--port={port}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        "--disable-usage-stats",
    ]
    command += [f"--{name}-port={number}" for name, number in zip(PORTS, others, strict=True)]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=200000000", f"--temp-dir={folder}"]
    head = subprocess.Popen(command, env=nodes, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    address = f"http://127.0.0.1:{dashboard}"
    del env["RAY_AUTH_MODE"]
    try:
        wait_for(address, head, 401 if nodes["RAY_AUTH_MODE"] == "token" else 200)
        yield address, env | {"HEAD_OF_THE_TESTS": f"127.0.0.1:{port}"}
    finally:
        head.terminate()
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            head.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster():
    with started(sys.executable) as made:
        yield made


def wait_for(address, head, answers):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.poll() is None, f"ray start ended with {head.returncode}"
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2)
            assert answers == 200, "the cluster must ask for its token"
            return
        except urllib.error.HTTPError as answer:
            assert answer.code == answers
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"no dashboard at {address}")


def submit(cluster, *arguments):
    address, env = cluster
    command = [sys.executable, "-m", "align_cluster.cli", "submit", *arguments, "--address", address]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_submitted_run_streams_its_log_leaves_its_lora_and_writes_its_secret_nowhere(cluster, tmp_path):
    address, env = cluster
    secret, sent = "hunter2-of-the-tests", ("--env", "SERVICE_TOKEN", "--file", str(tmp_path / "kept.txt"))
    (tmp_path / "kept.txt").write_text("a file of the job, which Ray's folder holds")
    arguments = ["configs/quickstart.yaml", "--out", str(tmp_path), "--name", "job", *sent, "--set", *TINY]
    done = submit((address, env | {"SERVICE_TOKEN": secret}), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 1/1" in done.stdout and done.stdout.rstrip().endswith("succeeded")
    summary = json.loads((tmp_path / "job" / "summary.json").read_text())
    assert summary["steps"] == 1 and (tmp_path / "job" / "lora" / "pytorch_lora_weights.safetensors").exists()
    pasted = done.stdout.split("stop it with\n")[1].splitlines()[0]
    bare = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    stopped = subprocess.run(pasted, shell=True, env=bare, capture_output=True, text=True, timeout=60)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    told = subprocess.run(
        pasted.replace(" stop ", " list ").rsplit(" ", 1)[0], shell=True, env=bare, capture_output=True
    )
    assert b"ALIGN_CLUSTER_SEALED" in told.stdout and secret.encode() not in told.stdout + told.stderr
    written = [
        file.read_bytes()
        for folder in (Path(env["RAY_AUTH_TOKEN_PATH"]).parent, tmp_path)
        for file in folder.rglob("*")
        if file.is_file()
    ]
    assert any(b"which Ray's folder holds" in text for text in written)
    assert any(b"ALIGN_CLUSTER_SEALED" in text for text in written), "Ray writes a job's variables into its log"
    assert not any(secret.encode() in text for text in written)


@pytest.mark.exhaustive
def test_a_job_without_its_token_ends_before_it_draws_and_says_whose_environment_lacks_it(cluster, tmp_path):
    far = "rewards.far={kind: http, url: 'http://10.0.0.5:8000', reward: clip, token: {env: SERVICE_TOKEN}}"
    done = submit(cluster, "configs/quickstart.yaml", "--out", str(tmp_path), "--set", *TINY, far)
    whose = f"the run's driver, a Ray job on {os.uname().nodename}; `submit --env SERVICE_TOKEN` sends yours"
    assert done.returncode == 1 and f"SERVICE_TOKEN is not set in the environment of {whose}" in done.stdout
    assert "note: the run reads the cluster's own SERVICE_TOKEN" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.exhaustive
def test_the_doctor_compares_a_run_file_with_the_nodes_that_a_dashboard_lists(cluster):
    address, env = cluster
    asked = ["--address", address, "--config", "configs/quickstart.yaml", "--quick"]
    for overrides, code, said in (
        ([], 0, "fits on 1 idle node: 2 samplers"),
        (["--set", "rewards.clip.pool.cpus=9"], 1, "rewards ask for more CPU cores"),
    ):
        command = [sys.executable, "-m", "align_cluster.cli", "doctor", *asked, *overrides]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == code and said in done.stdout, done.stdout + done.stderr


@pytest.fixture
def proxy(cluster):
    """Address of the dashboard behind a proxy that puts it under a path and cuts the first log in the middle."""
    with tempfile.NamedTemporaryFile("r") as port:
        program = [sys.executable, str(Path(__file__).with_name("proxy.py")), cluster[0], port.name]
        process = subprocess.Popen(program)
        try:
            while not (number := Path(port.name).read_text()):
                assert process.poll() is None
                time.sleep(0.1)
            yield f"http://127.0.0.1:{number}/teams/one/ray"
        finally:
            process.terminate()
            process.wait()


@pytest.mark.exhaustive
def test_a_job_that_is_left_and_followed_through_a_proxy_stops_as_sigterm_does_where_ctrl_c_is_answered_so(
    cluster, proxy, tmp_path
):
    env = cluster[1]
    (tmp_path / "env.yaml").write_text("env_vars: {WHO_SENT_IT: the file}\n")
    more = ["--no-wait", "--runtime-env", str(tmp_path / "env.yaml"), "--set", *TINY, "steps=1000"]
    left = submit((proxy, env), "configs/quickstart.yaml", "--out", str(tmp_path), "--name", "job", *more)
    assert left.returncode == 0, left.stdout + left.stderr
    told = re.search(r"align-cluster submit --follow (\S+) --address (\S+)", left.stdout)
    assert told[2] == proxy
    screen, ours = pty.openpty()
    command = [sys.executable, "-m", "align_cluster.cli", "submit", "--follow", told[1], "--address", proxy]
    following = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=ours, stdout=ours, stderr=ours, start_new_session=True
    )
    os.close(ours)
    shown = read_until(screen, following, "step 1/1000")
    driver = psutil.Process(int(re.match(r"process (\d+) of ", (tmp_path / "job" / "lock").read_text())[1]))
    assert driver.environ()["WHO_SENT_IT"] == "the file"
    following.send_signal(signal.SIGINT)
    shown += read_until(screen, following, "Stop it too? [y/N]")
    assert driver.is_running()
    os.write(screen, b"y\n")
    shown += read_until(screen, following, None)
    assert following.wait(60) == 130 and "stopping after its last finished step" in shown
    assert "ended by SIGTERM; start again with --resume auto" in shown
    assert shown.count("step 1/1000") == 1, "what was shown before the proxy cut the connection is shown once"
    assert list((tmp_path / "job" / "checkpoints").glob("step_*")), "it has saved its last finished step"
    again = submit((proxy, env), "--follow", told[1])
    assert again.returncode == 75 and "step 1/1000" in again.stdout and again.stdout.rstrip().endswith("stopped")
    wrong = submit((proxy, env), "--follow", "raysubmit_none")
    assert wrong.returncode == 2 and f"{proxy} has no job raysubmit_none" in wrong.stderr


def read_until(screen, process, text):
    """Read what a process writes to its terminal until `text` comes, or until it ends."""
    shown, deadline = "", time.monotonic() + 600
    while (text is None or text not in shown) and time.monotonic() < deadline:
        try:
            shown += os.read(screen, 65536).decode(errors="replace")
        except OSError:  # it has closed its terminal
            break
    assert text is None or text in shown, shown + str(process.poll())
    return shown


@pytest.mark.exhaustive
def test_a_failed_job_exits_with_1_and_shows_why(cluster, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    done = submit(cluster, "configs/quickstart.yaml", "--out", str(blocked), "--set", *TINY)
    assert done.returncode == 1 and str(blocked) in done.stdout and done.stdout.rstrip().endswith("failed")


@pytest.mark.exhaustive
def test_a_python_without_the_package_is_explained(cluster, tmp_path):
    bare = tmp_path / "bare.sh"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    done = submit(cluster, "configs/quickstart.yaml", "--out", str(tmp_path), "--python", str(bare))
    assert done.returncode == 1 and "give --python" in done.stdout


@pytest.mark.exhaustive
def test_prompt_files_travel_with_the_job_and_no_wait_returns_at_once(cluster, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a red circle\na photo of a blue star\n")
    run_file = tmp_path / "run.yaml"
    shutil.copy(ROOT / "configs" / "quickstart.yaml", run_file)
    on_file = ["prompts.kind=txt", f"prompts.path={prompts}", "rewards.geneval.kind=clip_score", "name=queued"]
    done = submit(cluster, str(run_file), "--out", str(tmp_path), "--no-wait", "--set", *TINY, *on_file)
    assert done.returncode == 0, done.stdout + done.stderr
    prompts.unlink()  # the job has its own copy
    summary = tmp_path / "queued" / "summary.json"
    deadline = time.monotonic() + 120
    while not summary.exists() and time.monotonic() < deadline:
        time.sleep(1)
    assert summary.exists()


@pytest.mark.exhaustive
def test_a_job_whose_driver_gets_sigterm_exits_with_75_and_goes_on_when_it_is_submitted_again(cluster, tmp_path):
    arguments = ["configs/quickstart.yaml", "--out", str(tmp_path), "--name", "job", "--resume", "auto"]
    address, env = cluster
    command = [sys.executable, "-m", "align_cluster.cli", "submit", *arguments, "--address", address]
    job = subprocess.Popen([*command, "--set", *TINY, "steps=1000"], cwd=ROOT, env=env, stdout=subprocess.PIPE)
    try:
        while len(read_jsonl(tmp_path / "job" / "metrics.jsonl")) < 2:  # the first step is finished then
            assert job.poll() is None
            time.sleep(0.2)
        driver = re.match(r"process (\d+) of ", (tmp_path / "job" / "lock").read_text())
        os.kill(int(driver[1]), signal.SIGTERM)
        job.communicate(timeout=120)
        assert job.returncode == 75
    finally:
        job.kill()
    (saved,) = (tmp_path / "job" / "checkpoints").glob("step_*")
    steps = int(saved.name[5:]) + 1
    again = submit(cluster, *arguments, "--set", *TINY, f"steps={steps}")
    assert again.returncode == 0 and f"step {steps}/{steps}" in again.stdout and f"step 1/{steps}" not in again.stdout


@pytest.fixture
def bare_python(tmp_path):
    """The Python of an environment that has what this package depends on, and not the package."""
    venv.create(tmp_path / "bare", with_pip=False)
    (packages,) = (tmp_path / "bare" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read: no sources
    return tmp_path / "bare" / "bin" / "python"


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_a_cluster_without_the_package_and_without_or_with_a_token_runs_the_code_that_goes_along(
    bare_python, tmp_path, mode
):
    arguments = ["configs/quickstart.yaml", "--out", str(tmp_path), "--name", "job", "--set", *TINY]
    with started(bare_python, PYTHONPATH=None, RAY_AUTH_MODE=mode) as cluster:
        lacks = submit(cluster, *arguments)
        assert lacks.returncode == 1 and "or --with-code" in lacks.stdout, lacks.stdout + lacks.stderr
        done = submit(cluster, *arguments, "--with-code")
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "job" / "lora" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.exhaustive
def test_train_on_the_machine_of_a_head_joins_it_by_auto_with_its_token(cluster, tmp_path):
    address, env = cluster
    folder = Path(env["RAY_AUTH_TOKEN_PATH"]).parent
    env = env | {"RAY_TMPDIR": str(folder), "RAY_ADDRESS": env["HEAD_OF_THE_TESTS"]}
    command = [sys.executable, "-m", "align_cluster.cli", "train", "configs/quickstart.yaml", "--out", str(tmp_path)]
    command += ["--name", "auto", "--set", *TINY, "cluster.address=auto"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "joining the Ray at auto" in done.stdout and (tmp_path / "auto" / "summary.json").exists()
