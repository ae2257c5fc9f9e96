"""The batch scripts on a real Slurm of two nodes."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from align_cluster.observe.sinks import read_jsonl

from .slurm_lab import lab, missing, until

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "slurm" / "train.sbatch"
STEPS = 30

slurm = pytest.mark.skipif(bool(missing()), reason=missing() or "a Slurm runs here")


def sbatch(here, out, *arguments, script=SCRIPT, **options):
    """Submit a script from `out`; return the job's number."""
    names = {"PYTHONPATH": ROOT, "ALIGN_CLUSTER_VENV": sys.prefix, "ALIGN_CLUSTER_OUT": out / "runs"}
    export = ",".join(["ALL", *(f"{name}={value}" for name, value in names.items())])
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return here("sbatch", "--parsable", f"--chdir={out}", f"--export={export}", *given, str(script), *arguments)


def train(here, out, name):
    settings = [f"steps={STEPS}", "checkpoint.every=1", "cluster.learners=1", "cluster.timeout_s=600"]
    tiny = [str(ROOT / "tests" / "system" / "tiny.yaml"), "--name", name, "--set", *settings]
    return sbatch(here, out, *tiny, nodes=2, cpus_per_task=1, time=120)


def steps(out, name):
    file = out / "runs" / name / "metrics.jsonl"
    return len(read_jsonl(file)) if file.exists() else 0


def lora(out, name):
    return (out / "runs" / name / "lora" / "pytorch_lora_weights.safetensors").read_bytes()


@slurm
@pytest.mark.exhaustive
def test_a_run_over_two_nodes_outlives_its_ray_its_time_limit_and_a_node_and_ends_with_the_same_bits(tmp_path):
    with tempfile.TemporaryDirectory(prefix="lab", dir="/tmp") as folder, lab(Path(folder)) as here:
        quiet = train(here, tmp_path, "quiet")
        here.until_ended(quiet, tmp_path / f"align-cluster-{quiet}.log")
        assert {path.name for path in (tmp_path / "runs" / f"slurm-{quiet}").glob("node-*")} == {"node-0", "node-1"}

        job = train(here, tmp_path, "disturbed")
        log = tmp_path / f"align-cluster-{job}.log"

        def after(step):
            here.until(job, log, lambda: steps(tmp_path, "disturbed") >= step, f"step {step}")

        after(1)
        of_node_1 = f"/tmp/align-cluster-{job}.1/"
        raylets = [one for one in psutil.process_iter() if one.name() == "raylet"]
        (raylet,) = (one for one in raylets if of_node_1 in str(one.cmdline()))
        raylet.send_signal(signal.SIGKILL)
        after(2)  # without the second node
        here("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes(here, job)}")
        here.until(job, log, lambda: here.field(job, "Restarts") == "1", "the job to be queued again")
        assert "the run has saved" in log.read_text() and "ended by SIGTERM" in log.read_text()
        assert "starting it again" in (tmp_path / "runs" / f"slurm-{job}" / "ray-1.log").read_text()
        here("scontrol", "update", f"JobId={job}", "TimeLimit=120")
        saved = steps(tmp_path, "disturbed")
        after(saved + 1)
        here("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        here("scontrol", "update", "NodeName=n2", "State=RESUME")
        here.until(job, log, lambda: here.field(job, "Restarts") == "2", "the job to be queued again")
        assert steps(tmp_path, "disturbed") < STEPS
        here.until_ended(job, log)
        assert f"going on after step {saved} of {STEPS}" in log.read_text()
        assert lora(tmp_path, "disturbed") == lora(tmp_path, "quiet")


def minutes(here, job):
    """The time limit, in minutes, that a job reaches within its warning time of three minutes."""
    hours, mins, _ = here.field(job, "RunTime").split(":")
    return 60 * int(hours[-2:]) + int(mins) + 2


@slurm
@pytest.mark.exhaustive
def test_a_run_file_that_is_not_there_ends_the_job_with_one_sentence(tmp_path):
    with tempfile.TemporaryDirectory(prefix="lab", dir="/tmp") as folder, lab(Path(folder)) as here:
        for arguments, said in (
            (("gone.yaml",), "error: gone.yaml is no run file; give the path of one"),
            ((), "error: no run file; give it after the script"),
        ):
            job = sbatch(here, tmp_path, *arguments, nodes=1)
            until(lambda job=job: here.field(job, "JobState") == "FAILED", "the job to fail")
            assert here.field(job, "ExitCode") == "2:0"
            assert said in (tmp_path / f"align-cluster-{job}.log").read_text()


@slurm
@pytest.mark.exhaustive
def test_a_reward_service_on_slurm_says_where_it_is_asks_for_its_token_and_is_queued_again(tmp_path):
    from align_cluster.rewards.http import RewardClient, Unauthorized

    with tempfile.TemporaryDirectory(prefix="lab", dir="/tmp") as folder, lab(Path(folder)) as here:
        script = ROOT / "deploy" / "slurm" / "rewards.sbatch"
        file = str(ROOT / "configs" / "rewards_service.yaml")
        job = sbatch(here, tmp_path, file, "--set", "rewards.geneval=null", "deployments.geneval=null", script=script)
        url, token = tmp_path / "runs" / "rewards.url", tmp_path / "runs" / "rewards.token"
        until(url.exists, (tmp_path / f"align-rewards-{job}.log").name)
        RewardClient(url.read_text().strip(), token.read_text()).rewards()
        with pytest.raises(Unauthorized):
            RewardClient(url.read_text().strip(), "another").rewards()
        here("scancel", "--signal=TERM", "--batch", job)
        until(lambda: here.field(job, "Restarts") == "1", "the job to be queued again")
        assert not url.exists()
        here("scancel", job)


def test_a_script_that_is_not_started_by_sbatch_says_so():
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    for script in (SCRIPT, SCRIPT.with_name("rewards.sbatch")):
        done = subprocess.run(["bash", script, "x"], env=env, capture_output=True, text=True)
        assert done.returncode and "this is a batch script: start it with sbatch" in done.stderr
