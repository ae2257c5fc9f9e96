"""The run directory names every file of a run; no run overwrites another."""

import fcntl
import getpass
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align_cluster.errors import UserError


class RunDir:
    """Holds the paths of one run's files. The constructor touches nothing; `create` makes a new directory."""

    def __init__(self, path: Path | str) -> None:
        """Name the files of the run in the folder `path`, which need not exist."""
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.summary = self.path / "summary.json"
        self.state = self.path / "state.json"
        self.timeline = self.path / "timeline.json"
        self.grids = self.path / "grids"
        self.grid_prompts = self.grids / "prompts.json"
        self.tensorboard = self.path / "tensorboard"
        self.trackers = self.path / "trackers"
        whole = self.path.absolute()  # "." has no name of its own
        self.prometheus = whole.with_name(f"{whole.name}.prometheus.json")
        self.lora = self.path / "lora"
        self.critic = self.path / "critic"
        self.lora_weights = self.lora / "pytorch_lora_weights.safetensors"
        self.report = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.lock_file = self.path / "lock"

    @classmethod
    def create(cls, out: Path | str, name: str) -> "RunDir":
        """Make the folder `out/name`, or `out/name-2`, `out/name-3` ... if that exists and is not empty.

        A folder that already holds `grids/` is renamed into place: rename(2) replaces nothing or an empty folder and
        fails on any other, so two runs that start at once get different names. UserError where `out` cannot hold runs.
        """
        out = Path(out)
        staged = out / f".{uuid.uuid4().hex}"
        try:
            (staged / "grids").mkdir(parents=True)
        except OSError as error:
            raise UserError(f"out: {out} cannot hold runs ({error.strerror}); give --out another folder") from error
        number = 1
        while True:
            target = out / (name if number == 1 else f"{name}-{number}")
            try:
                os.rename(staged, target)
            except OSError:
                if not os.path.exists(target):  # not a name that is taken but, say, a full or read-only disk
                    shutil.rmtree(staged, ignore_errors=True)
                    raise
                number += 1
            else:
                return cls(target)

    def holds_a_run(self) -> bool:
        """Return whether a run has written here. Its settings alone do not count, because exports hold them too."""
        return self.grids.is_dir() or any(map(Path.is_file, (self.metrics, self.evaluations, self.summary, self.state)))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Own the directory until the context is left or the process ends, however it ends.

        The operating system holds the lock; the file's content only names the owner. UserError where another process
        has the lock, or the directory cannot be written.
        """
        try:
            file = self.lock_file.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); make it writable, or give another --out"
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise UserError(
                    f"{self.path} is in use by {owner}; wait for it or stop it, or start another run without --resume"
                ) from None
            except OSError:
                pass  # some network file systems have no locks
            file.truncate(0)
            file.write(
                f"process {os.getpid()} of {_user()} on {socket.gethostname()}, since {time.strftime('%F %T')}\n"
            )
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    def discard_unused(self) -> None:
        """Remove the directory if nothing has been measured or drawn in it."""
        if not (self.metrics.exists() or self.evaluations.exists() or self.grid_steps()):
            shutil.rmtree(self.path, ignore_errors=True)

    def grid(self, step: int) -> Path:
        """Return the path of the sample grid after `step` steps; step 0 is the base model."""
        return self.grids / f"step_{step:06d}.png"

    def grid_steps(self) -> list[int]:
        """Return the steps that have a grid, in ascending order. Links are none, since a grid is shown and copied."""
        found = [(re.fullmatch(r"step_([0-9]{6,12})\.png", path.name), path) for path in self.grids.glob("step_*.png")]
        return sorted(int(name[1]) for name, path in found if name and path.is_file() and not path.is_symlink())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, a user may have no name
        return f"user {os.getuid()}"
