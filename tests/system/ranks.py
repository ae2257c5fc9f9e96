"""Ranks of a learner in processes of their own, beside Ray: the scripts *_worker.py."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align_cluster.cluster.preload import Preload

ROOT = Path(__file__).parents[2]


@contextmanager
def ranks(preload: Preload, script: Path, world: int, *arguments: object) -> Iterator[list[subprocess.Popen]]:
    """`script`, in forks, as the ranks 0 to world - 1 of one group: script RANK WORLD PORT ARGUMENT... None outlives
    the context for long."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    commands = [[*preload.command, script, *map(str, (rank, world, port, *arguments))] for rank in range(world)]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
