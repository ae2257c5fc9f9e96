"""Measures wall time by stage, and knows which stage it is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Clock:
    """Counts seconds by stage, of the current step (`step`) and since the start (`total`).

    `number` is the step at work, from 1, which began at `step_began` (monotonic). `doing` is the stage at work with the
    time that it began (monotonic).
    """

    def __init__(self, began: float | None = None) -> None:
        """Count from now, or with the start from `began` on, by the monotonic clock."""
        self.began = time.perf_counter() - (time.monotonic() - began if began is not None else 0.0)
        self.number = 0
        self.doing = ("start", time.monotonic())
        self.step: dict[str, float] = {}
        self.step_began = time.monotonic()
        self.total: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage."""
        for table in (self.step, self.total):
            table[stage] = table.get(stage, 0.0) + seconds

    def add_all(self, seconds: dict[str, float]) -> None:
        """Add seconds by stage that were measured elsewhere."""
        for stage, spent in seconds.items():
            self.add(stage, spent)

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Say that the time inside is stage `name`, without counting it."""
        outer, self.doing = self.doing, (name, time.monotonic())
        yield
        self.doing = outer

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside as stage `name`."""
        started = time.perf_counter()
        with self.at(name):
            yield
        self.add(name, time.perf_counter() - started)

    def next_step(self, number: int) -> None:
        """Begin to count step `number`."""
        self.step, self.number, self.step_began = {}, number, time.monotonic()

    def end_step(self) -> float:
        """Return the wall time of the step. What no stage has counted becomes the stage "driver"."""
        whole = time.monotonic() - self.step_began
        self.add("driver", max(0.0, whole - sum(self.step.values())))
        return whole

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"wall": self.wall(), "total": dict(self.total)}

    def restore(self, state: dict[str, Any]) -> None:
        """Count on from `state()` of an earlier run. The time in between does not count."""
        self.began -= state["wall"]
        for stage, seconds in state["total"].items():
            self.total[stage] = self.total.get(stage, 0.0) + seconds

    def wall(self) -> float:
        """Return the seconds since the run began, over all its parts."""
        return time.perf_counter() - self.began
