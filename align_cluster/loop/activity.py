"""Measures who worked when in a step: what share of it each pool waits, and whether another split would be quicker."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from align_cluster.cluster.placement import slots
from align_cluster.cluster.slots import Span
from align_cluster.config.split import advice
from align_cluster.files import write_json
from align_cluster.loop.clock import Clock
from align_cluster.loop.workers import WorkerGroup
from align_cluster.observe.rundir import RunDir

JOIN = 0.005  # share of a step by which two spans of the same work may be apart and still be shown as one
CHECKED = slice(2, 6)  # the steps by whose mean the split is judged: the ones before load and compile networks


class Activity:
    """Looks at a run's pools at the end of each step.

    A worker is at work while the driver waits for an answer of it. The timeline of the last step is in timeline.json.
    """

    def __init__(self, workers: WorkerGroup, clock: Clock, run: RunDir, note: Callable[[str], None]) -> None:
        self.workers, self.clock, self.run, self.note = workers, clock, run, note
        self.gpus = sum(bundle.get("GPU", 0.0) for bundle in slots(workers.plan)[0])
        self.seen: deque[tuple[float, float, float]] = deque(maxlen=CHECKED.stop)

    def measure(self, step: int, images: int) -> dict[str, float]:
        """Return the metrics of who worked in the step that ends now, in which `images` were trained on."""
        start, end = self.clock.step_began, time.monotonic()
        seconds, workers = end - start, self.workers
        pools = {"samplers": [workers.samplers], "learners": [workers.ranks], "rewards": workers.rewards}
        sizes = {
            "samplers": len(workers.samplers.ready_workers),
            "learners": workers.plan.learners,
            "rewards": sum(len(pool.ready_workers) for pool in workers.rewards),
        }
        found, busy, lanes = {}, {}, []
        for name, members in pools.items():
            spans = [clipped(span, start, end) for pool in members for span in pool.work(start)]
            busy[name] = sum(span.end - span.start for span in spans)
            found[f"idle/{name}"] = min(1.0, max(0.0, 1 - busy[name] / (seconds * max(1, sizes[name]))))
            lanes += timeline(spans, start, JOIN * seconds, name)
        with suppress(OSError):  # a full disk costs a picture; those who write what counts say so
            write_json(self.run.timeline, {"step": step, "seconds": round(seconds, 4), "workers": lanes})
        self._judge(busy["samplers"], busy["learners"], seconds)
        workers.idle = found
        return found | ({"throughput/images_per_gpu_s": images / seconds / self.gpus} if self.gpus else {})

    def _judge(self, drawing: float, training: float, seconds: float) -> None:
        """Say once, after the first steps, whether another split of the workers would make steps shorter."""
        plan = self.workers.plan
        if not plan.config.loop.ahead or len(self.seen) == CHECKED.stop:
            return
        self.seen.append((drawing, training, seconds))
        if len(self.seen) == CHECKED.stop:
            drawing, training, seconds = np.mean(list(self.seen)[CHECKED], 0).tolist()
            said = advice((drawing, training), plan.pieces, (plan.samplers, plan.learners), seconds)
            if said:
                self.note(said)


def clipped(span: Span, start: float, end: float) -> Span:
    """Return the part of a span between two times; it is empty where the span is outside."""
    begin = min(max(span.start, start), end)
    return span._replace(start=begin, end=max(begin, min(span.end, end)))


def timeline(spans: Sequence[Span], start: float, gap: float, pool: str) -> list[dict[str, Any]]:
    """Return the spans by worker, in seconds after `start`; neighbours of the same work at most `gap` apart are one."""
    lanes: dict[str, list[list]] = {}
    for span in sorted(spans, key=lambda span: span.start):
        lane = lanes.setdefault(span.worker, [])
        if lane and lane[-1][0] == span.doing and span.start - start - lane[-1][2] <= gap:
            lane[-1][2] = max(lane[-1][2], round(span.end - start, 4))
        else:
            lane.append([span.doing, round(span.start - start, 4), round(span.end - start, 4)])
    return [{"worker": worker, "pool": pool, "spans": lane} for worker, lane in sorted(lanes.items())]
