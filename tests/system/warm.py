"""A Python in which Ray's workers, and scripts beside this file, start warm: forks of a process that has imported torch
and its company once.

On two cores most of a small run is spent in imports, five to ten seconds in each worker. These are real Ray workers all
the same: Ray's own worker program runs in a fork instead of a new interpreter. Tests whose command line starts a Ray of
its own start workers the usual way.
"""

import gc
import importlib
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Without ray: it reads its environment, which is each worker's own, when it is imported.
MODULES = (
    *("align_cluster.rollouts.sampler", "align_cluster.learner.worker", "align_cluster.rewards.worker"),
    *("align_cluster.rewards.clip_score", "align_cluster.rewards.geneval", "align_cluster.pretraining.networks"),
    *("transformers.models.clip.modeling_clip", "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"),
    *("deepspeed.runtime.engine", "deepspeed.runtime.zero.muon.muon_optimizer"),
)
# What Ray takes for its Python. Of Ray only workers are forked, and those without a runtime environment of their own.
SCRIPT = """#!/bin/sh
case "$1" in
  */default_worker.py | {folder}/*) exec {python} -I -S {here} {address} "$@" ;;
  *) exec {python} "$@" ;;
esac
"""


@contextmanager
def python(folder: Path) -> Iterator[Path]:
    """Path of a Python for `ray.init`, as long as the context lasts."""
    address, script = folder / "warm", folder / "python"
    with subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE) as server:
        try:
            if not any(line == b"warm\n" for line in server.stdout):  # what is imported may print, too
                raise RuntimeError("the process that workers are forked from did not come up")
            paths = {"python": sys.executable, "address": address, "here": __file__, "folder": Path(__file__).parent}
            script.write_text(SCRIPT.format(**{name: shlex.quote(str(path)) for name, path in paths.items()}))
            script.chmod(0o755)
            yield script
        finally:
            server.terminate()


def serve(address: str) -> None:
    for name in MODULES:
        importlib.import_module(name)
    if "ray" in sys.modules:
        raise RuntimeError("ray was imported")
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)
        print("warm", flush=True)
        while True:
            connection, _ = server.accept()
            size, files, _, _ = socket.recv_fds(connection, 8, 3)
            asked = connection.recv(int(size), socket.MSG_WAITALL)
            if os.fork():
                connection.close()
                for file in files:
                    os.close(file)
            else:
                server.close()
                return become(json.loads(asked), files, connection)


def become(asked: dict, files: list[int], connection: socket.socket) -> None:
    """Be the process that was asked for, and no longer than whoever asked is there."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for standard, file in enumerate(files):
        os.dup2(file, standard)
        os.close(file)
    os.chdir(asked["folder"])
    os.nice(asked["nice"] - os.nice(0))
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["command"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    threading.Thread(target=follow, args=(connection,), daemon=True).start()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    sys.stdout.flush()
    connection.sendall(b"0")  # it ended well


def follow(connection: socket.socket) -> None:
    """End when whoever asked is gone."""
    connection.recv(1)
    os._exit(1)


def ask(address: str, command: list[str]) -> None:
    """Have the process of this command line forked, be there as long as it is, and end as well as it does."""
    own = {"environment": dict(os.environ), "folder": os.getcwd(), "nice": os.nice(0)}
    asked = json.dumps({"command": command, **own}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [f"{len(asked):8d}".encode()], [0, 1, 2])
        connection.sendall(asked)
        well = connection.recv(1)
        connection.recv(1)  # until it is gone
        sys.exit(not well)


if __name__ == "__main__":
    ask(sys.argv[1], sys.argv[2:]) if len(sys.argv) > 2 else serve(sys.argv[1])
