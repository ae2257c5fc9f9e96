"""What a run is doing, for people who look at it from outside: state.json every few seconds, and a line in the log when
somebody is waited for too long."""

import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from align_cluster.cluster.slots import Doing
from align_cluster.config.run import RunConfig
from align_cluster.files import write_json
from align_cluster.loop.clock import Clock
from align_cluster.loop.workers import Crew
from align_cluster.observe.rundir import RunDir

BEAT_S = 2.0
log = logging.getLogger(__name__)


class Watch:
    """A thread beside the loop, which says what the loop does even while that waits. It asks nothing of the workers:
    what a worker does, and since when, is what it was last given to do."""

    def __init__(self, path: Path, config: RunConfig, clock: Clock, crew: Crew) -> None:
        self.file, self.config, self.clock, self.crew = RunDir(path).state, config, clock, crew
        self.told: dict[tuple[str, str], float] = {}
        self.mute: set[str | None] = set()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
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
            for sentence in self.late(state):
                log.warning("%s", sentence)

    def _write(self, state: dict[str, Any]) -> None:
        try:
            write_json(self.file, state)
        except OSError as error:
            if error.strerror not in self.mute:
                self.mute.add(error.strerror)
                log.warning("%s cannot be written (%s); `doctor` shows an old state", self.file, error.strerror)

    def state(self) -> dict[str, Any]:
        """Content of state.json. Ages are in seconds, since a clock may be set; `beat` alone is a time of day."""
        now = time.monotonic()
        phase, since = self.clock.doing
        troubles = sorted(trouble for group in self.crew.groups for trouble in list(group.troubles))
        return {
            "host": platform.node(),
            "pid": os.getpid(),
            "beat": time.time(),
            "step": self.clock.number,
            "steps": self.config.steps,
            "phase": phase,
            "seconds": round(now - since, 1),
            "progress": {stage: list(counts) for stage, counts in self.crew.progress.items()},
            "late_s": self.config.cluster.late_s,
            "workers": [_entry(doing, now) for group in self.crew.groups for doing in group.roster()],
            "troubles": [{"at": at, "what": text} for at, text in troubles[-20:]],
            "error": None,
        }

    def late(self, state: dict[str, Any]) -> Iterator[str]:
        """Who is waited for, each said once and then whenever the time has doubled."""
        limit = self.config.cluster.late_s
        for worker in state["workers"]:
            name, phase, seconds = worker["name"], worker["phase"], worker["seconds"]
            if seconds < limit:
                self.told.pop((name, phase), None)  # it has answered since
            elif worker["waiting"] and seconds >= self.told.get((name, phase), limit):
                self.told[name, phase] = 2 * seconds
                where = f" ({worker['place']})" if worker["place"] else ""
                yield (
                    f"step {state['step']}: the driver, in {state['phase']} since {state['seconds']:.0f} s, waits for "
                    f"{name}{where}: {phase} since {seconds:.0f} s"
                )


def _entry(doing: Doing, now: float) -> dict[str, Any]:
    return {
        "name": doing.worker,
        "place": doing.place,
        "phase": doing.phase,
        "seconds": round(now - doing.since, 1),
        "waiting": doing.waiting,
    }
