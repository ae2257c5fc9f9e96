"""Workers that start in a moment: forks of one process that has imported what they need, see forkserver.py."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from align_cluster.cluster import forkserver

if TYPE_CHECKING:
    from align_cluster.config.run import RunConfig

# What Ray takes for its Python. Only its workers are forked, and only those without a runtime environment of their own,
# whose command line begins with another program. All else that Ray starts is its own business.
SCRIPT = """#!/bin/sh
case "$1" in
  */default_worker.py) exec {ask} "$@" ;;
  *) exec {python} "$@" ;;
esac
"""
PATIENCE_S = 10.0  # how long the process may take to end: it might be in the middle of an import
log = logging.getLogger(__name__)


class Preload:
    """A context with a process that imports what workers need, beside everything that this process does meanwhile.

    It ends with the context, or with this process. Where it cannot start, or ends early, workers start the ordinary
    way, which one line in the log says.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ac-"))
        # -I -S: whoever asks needs nothing but the standard library, and is there in 20 ms.
        self.command = [sys.executable, "-I", "-S", forkserver.__file__, str(self.folder)]
        self.ending = self.used = False
        self.python = self.folder / "python"
        self.python.write_text(SCRIPT.format(ask=shlex.join(self.command), python=shlex.quote(sys.executable)))
        self.python.chmod(0o700)
        with (self.folder / "log").open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", *self.command[3:]],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
                process_group=0,  # Ctrl-C is meant for this process, which ends that one
            )
        self._tell(sys.path)
        threading.Thread(target=self._watch, daemon=True).start()

    def load(self, names: Sequence[str]) -> None:
        """Name what else this run's workers need, each as `pkgutil.resolve_name` takes it. No fork starts before."""
        self.used = True
        self._tell(names)

    def _tell(self, value: Sequence[str]) -> None:
        try:
            print(json.dumps(value), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return  # it is gone, which `_watch` says

    def _watch(self) -> None:
        self.process.wait()
        if not self.ending:
            reason = (self.folder / "log").read_text().strip().splitlines()[-1:] or ["no reason given"]
            log.warning("the process that workers are forked from has ended, and workers start slowly: %s", *reason)

    @contextmanager
    def used_by_ray(self) -> Iterator[None]:
        """Let the Ray that starts in this context fork its workers."""
        if not os.access(self.python, os.X_OK):
            log.warning("%s cannot be executed there, and workers start slowly", self.python)
            yield
            return
        before, sys.executable = sys.executable, str(self.python)
        try:
            yield
        finally:
            sys.executable = before

    def __enter__(self) -> "Preload":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; forks go on."""
        self.ending = True
        if not self.used:  # nothing came of it, and whoever mistyped something need not wait until its imports end
            self.process.kill()
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def preload() -> Iterator[Preload | None]:
    """Start a `Preload` where it is of use: on Linux, unless the environment names a Ray that runs already."""
    if sys.platform == "linux" and not os.environ.get("RAY_ADDRESS"):
        with Preload() as ready:
            yield ready
    else:
        yield None


def imports(config: "RunConfig") -> list[str]:
    """Name what the workers of a run import besides what those of every run do.

    Rewards with a pool of their own packages are left out: their workers are no forks.
    """
    from align_cluster.backbones import BACKBONES
    from align_cluster.rewards import REWARDS

    rewards = [reward for reward in config.rewards.values() if not (reward.pool and reward.pool.pip)]
    names = [*BACKBONES[config.backbone.kind].imports(), *(n for r in rewards for n in REWARDS[r.kind].imports)]
    return list(dict.fromkeys(names))
