"""Tells people outside what a run is doing: state.json every few seconds, and a log line when a worker is late."""

import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from align_cluster.cluster.nodes import log_folder
from align_cluster.cluster.slots import WorkerStatus
from align_cluster.config.run import RunConfig
from align_cluster.files import write_json
from align_cluster.loop.clock import Clock
from align_cluster.loop.workers import WorkerGroup
from align_cluster.observe.rundir import RunDir

BEAT_S = 2.0
log = logging.getLogger(__name__)


class Heartbeat:
    """Runs a thread beside the loop, which says what the loop does even while the loop waits.

    It asks nothing of the workers: what a worker does is what it was last given to do. `beat` is called at each write.
    """

    def __init__(
        self, path: Path, config: RunConfig, clock: Clock, workers: WorkerGroup, beat: Callable[[], None] = lambda: None
    ) -> None:
        self.file, self.config, self.clock, self.workers = RunDir(path).state, config, clock, workers
        self.beat = beat
        self.said: dict[tuple[str, str], float] = {}  # when to say again that a worker is late
        self.failures: set[str | None] = set()  # errors of the disk that were logged once
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join(timeout=10)
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        why = "interrupted" if interrupted else f"{kind.__name__}: {error}".splitlines()[0] if kind else None
        self._write(self.state() | {"phase": "failed" if kind else "done", "error": why, "workers": []})

    def _run(self) -> None:
        while not self.ended.wait(BEAT_S):
            state = self.state()
            self._write(state)
            self.beat()
            for worker, sentence in self.late(state):
                log.warning("%s", sentence, extra={"worker": worker})

    def _write(self, state: dict[str, Any]) -> None:
        try:
            write_json(self.file, state)
        except OSError as error:
            if error.strerror not in self.failures:
                self.failures.add(error.strerror)
                log.warning("%s cannot be written (%s); `doctor` shows an old state", self.file, error.strerror)

    def state(self) -> dict[str, Any]:
        """Return the content of state.json.

        Ages are in seconds, because a clock may be set; only `beat` is a time of day.
        """
        now = time.monotonic()
        phase, since = self.clock.doing
        events = sorted(event for group in self.workers.groups for event in list(group.events))
        return {
            "host": platform.node(),
            "pid": os.getpid(),
            "beat": time.time(),
            "step": self.clock.number,
            "steps": self.config.steps,
            "phase": phase,
            "seconds": round(now - since, 1),
            "progress": {stage: list(counts) for stage, counts in self.workers.progress.items()},
            "idle": {name: round(share, 3) for name, share in self.workers.idle.items()},
            "late_s": self.config.cluster.late_s,
            "workers": [_entry(doing, now) for group in self.workers.groups for doing in group.status()],
            "logs": log_folder(),
            "events": [{"at": at, "what": text} for at, text in events[-20:]],
            "error": None,
        }

    def late(self, state: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield each worker that is late with a sentence: once, and again whenever its time has doubled."""
        limit = self.config.cluster.late_s
        for worker in state["workers"]:
            name, phase, seconds = worker["name"], worker["phase"], worker["seconds"]
            if seconds < limit:
                self.said.pop((name, phase), None)  # it has answered since
            elif worker["waiting"] and seconds >= self.said.get((name, phase), limit):
                self.said[name, phase] = 2 * seconds
                where = f" ({worker['location']})" if worker["location"] else ""
                yield (
                    name,
                    f"step {state['step']}: the driver, in {state['phase']} since {state['seconds']:.0f} s, waits for "
                    f"{name}{where}: {phase} since {seconds:.0f} s",
                )


def _entry(doing: WorkerStatus, now: float) -> dict[str, Any]:
    return {
        "name": doing.worker,
        "location": doing.location,
        "phase": doing.phase,
        "seconds": round(now - doing.since, 1),
        "waiting": doing.waiting,
    }
