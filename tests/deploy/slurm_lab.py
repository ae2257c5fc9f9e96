"""A Slurm of two nodes on this machine, with its own munge, ports and folder. Needs root and Debian's slurm-wlm."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ReturnToService=2
KillWait=30
MinJobAge=3600
JobRequeue=1
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""


def missing() -> str:
    """Say what keeps a Slurm from running here; "" where it can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if absent:
        return f"no Slurm here, {', '.join(absent)} are missing: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons want root here"


@contextmanager
def lab(folder: Path) -> Iterator["Lab"]:
    """Run the two nodes for the length of a with block."""
    port, first, second = _free_ports()
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(parents=True)
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(host=host, folder=folder, port=port, first=first, second=second, cpus=len(os.sched_getaffinity(0)))
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    env = os.environ | {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    daemons = [munge, ["slurmctld", "-D", "-f", conf], *(["slurmd", "-D", "-N", n, "-f", conf] for n in ("n1", "n2"))]
    processes: list[subprocess.Popen] = []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        for daemon in daemons:
            processes.append(subprocess.Popen(daemon, env=env, **quiet))
            if daemon is munge:
                until((folder / "munge.socket").exists, "munge")
        made = Lab(env)
        until(lambda: made("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", "two idle nodes")
        yield made
    finally:
        if processes:
            subprocess.run(["scancel", "--full", "--me"], env=env, **quiet)
            time.sleep(2)
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait()


class Lab:
    """Calls Slurm's programs, and waits for what they say."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env

    def __call__(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """Return one field of a job, as `scontrol show job` has it."""
        return next(word for word in self("scontrol", "show", "job", job).split() if word.startswith(f"{name}=")).split(
            "=", 1
        )[1]

    def until_ended(self, job: str, log: Path) -> None:
        """Wait until a job has ended, as it should."""
        until(lambda: self.field(job, "JobState") not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), job)
        assert self.field(job, "JobState") == "COMPLETED", log.read_text()

    def until(self, job: str, log: Path, holds: Callable[[], bool], what: str) -> None:
        """Wait until something holds, while the job is not failed. Slurm lets two minutes pass before it starts a job
        again."""

        def checked() -> bool:
            assert self.field(job, "JobState") != "FAILED", f"job {job}: {log.read_text()}"
            return holds()

        until(checked, what)


def until(holds: Callable[[], bool], what: str, patience_s: float = 900) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.5)


def _free_ports() -> list[int]:
    """Return three free ports in a row: Slurm takes the nodes' ports as a range."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            ports = [first.getsockname()[1] + index for index in range(3)]
        try:
            for port in ports:
                with socket.socket() as each:
                    each.bind(("127.0.0.1", port))
            return ports
        except OSError:
            continue
