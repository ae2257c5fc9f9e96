"""Writes checkpoints in a thread while training continues."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from align_cluster.checkpoint import CheckpointConfig
from align_cluster.checkpoint.store import Store
from align_cluster.interrupts import SAVING


@dataclass(frozen=True)
class Job:
    """Describes one checkpoint to write: `files` makes the content in the writer's thread, `about` helps to choose."""

    step: int
    files: Callable[[], dict[str, bytes]]
    about: dict[str, Any] = field(default_factory=dict)


class Writer:
    """Writes one checkpoint at a time.

    A failed write does not end the run: `note` is called with a sentence, and the checkpoint before stays. `saved` is
    the step of the last successful write, or None.
    """

    def __init__(self, store: Store, config: CheckpointConfig, note: Callable[[str], None]) -> None:
        self.store, self.config, self.note = store, config, note
        self.saved: int | None = None
        self.thread: threading.Thread | None = None

    def save(self, job: Job) -> None:
        """Start to write a checkpoint, after the one before is written."""
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(job,), name=f"{SAVING} {job.step}")
        self.thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def _write(self, job: Job) -> None:
        try:
            self.store.write(job.step, job.files(), job.about)
            self.saved = job.step
            self.store.prune(self.config.keep, self.config.keep_best)
        except Exception as error:  # each file system has its own errors, and none of them may end the run
            before = "there is none before it" if self.saved is None else f"the last one is of step {self.saved}"
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            if self.saved == job.step:
                self.note(f"old checkpoints in {self.store.path} could not be removed ({reason})")
            else:
                self.note(
                    f"the checkpoint of step {job.step} could not be written to {self.store.path} ({reason}); training "
                    f"goes on, {before}; make room there, or give another checkpoint.path and --resume"
                )
