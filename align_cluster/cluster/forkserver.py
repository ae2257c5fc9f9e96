"""The process that workers are forks of, and the program that asks it for one.

    forkserver.py FOLDER                   import, then fork whenever somebody asks, until stdin ends
    forkserver.py FOLDER SCRIPT ARG...     be SCRIPT in a fork of the process that serves at FOLDER

Imports take most of the start of a small run: four to ten seconds of a core in each worker. A fork has them already. It
is the same worker in everything else: the server runs Ray's own worker program in it, with the environment, folder,
files, signal mask and priority of whoever asked. Whoever asked stays until the fork ends, and the fork ends with it.
Linux only: macOS allows no fork without exec.
"""

import json
import os
import signal
import socket
import sys

# What every run needs. Without ray: it reads its environment, which is each worker's own, when it is imported.
EVERY_RUN = (
    *("align_cluster.rollouts.sampler", "align_cluster.learner.worker", "align_cluster.rewards.worker"),
    *("peft", "transformers.modeling_utils", "diffusers.models.modeling_utils"),
)
# DeepSpeed decides for a device while it is imported. Where there is no GPU, only one is possible.
WITHOUT_GPU = ("deepspeed.runtime.engine", "deepspeed.runtime.zero.muon.muon_optimizer")
STARTED, ENDED_WELL = b"s", b"0"


def serve(folder: str) -> None:
    """Import, and fork whenever somebody asks, until the driver's end of stdin closes. Then remove the folder."""
    import gc
    import select
    import shutil

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    gc.disable()  # a quarter of the time would go into looking through what stays for ever
    own_path = list(sys.path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/socket")
        server.listen(64)
        if prepare():
            gc.freeze()
            gc.enable()
            while server in select.select([server, 0], [], [])[0]:
                connection, _ = server.accept()
                if not os.fork():
                    server.close()
                    sys.path[:] = own_path
                    return become(connection)
                connection.close()
    shutil.rmtree(folder, ignore_errors=True)


def prepare() -> bool:
    """Import what every run needs, and then what the driver names on stdin; tell whether the driver still wants it."""
    import importlib
    import pkgutil

    sys.path[:] = json.loads(sys.stdin.readline())
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask whether there is a GPU must not initialise CUDA
    cpu = not os.path.exists("/dev/nvidiactl")
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    for name in EVERY_RUN + (WITHOUT_GPU if cpu else ()):
        importlib.import_module(name)
    names = sys.stdin.readline()
    for name in json.loads(names or "[]"):
        pkgutil.resolve_name(name)
    import torch

    if torch.cuda.is_initialized() or "ray" in sys.modules:
        raise RuntimeError("an import has initialised CUDA or Ray, which no fork can undo")
    return bool(names)


def become(connection: socket.socket) -> None:
    """Be the process that was asked for, in a fork of the server, and no longer than whoever asked is there."""
    import random
    import runpy
    import threading

    import numpy
    import torch

    if torch.cuda._is_in_bad_fork():  # an import has asked CUDA for its devices: whoever asked starts without a fork
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    asked = json.loads(connection.recv(int(size), socket.MSG_WAITALL))
    for standard, file in enumerate(files):
        os.dup2(file, standard)
        os.close(file)
    os.chdir(asked["folder"])
    os.setpgid(0, asked["group"])
    os.nice(asked["nice"] - os.nice(0))
    with open(f"/proc/{asked['pid']}/oom_score_adj") as theirs, open("/proc/self/oom_score_adj", "w") as own:
        own.write(theirs.read())  # Ray lets workers be the first to go where memory runs out
    signal.pthread_sigmask(signal.SIG_SETMASK, asked["blocked"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["command"]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    random.seed()
    numpy.random.seed()
    threading.Thread(target=follow, args=(connection,), daemon=True).start()
    connection.sendall(STARTED)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    sys.stdout.flush()
    connection.sendall(ENDED_WELL)


def follow(connection: socket.socket) -> None:
    """End when whoever asked is gone."""
    try:
        connection.recv(1)
    finally:  # a reset is an end as well, where something sent was not read
        os._exit(1)


def ask(folder: str, command: list[str]) -> None:
    """Have this command line's process forked, and end as it ends. Where nothing serves, start it the ordinary way."""
    own = {
        "command": command,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "pid": os.getpid(),
        "group": os.getpgrp(),
        "nice": os.nice(0),
        "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }
    asked = json.dumps(own).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(f"{folder}/socket")
            socket.send_fds(connection, [f"{len(asked):8d}".encode()], [0, 1, 2])
            connection.sendall(asked)
            started = connection.recv(1) == STARTED
        except OSError:
            started = False
        if started:
            well = connection.recv(1) == ENDED_WELL
            connection.recv(1)  # until it is gone
            sys.exit(not well)
    print("nothing to fork from: this process imports everything itself", file=sys.stderr, flush=True)
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    ask(sys.argv[1], sys.argv[2:]) if len(sys.argv) > 2 else serve(sys.argv[1])
