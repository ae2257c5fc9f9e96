"""Starts a run's trackers, and collects what those of live values get between steps."""

import time
from collections.abc import Callable

from align_cluster.cluster import meters
from align_cluster.config.run import RunConfig
from align_cluster.loop.clock import Clock
from align_cluster.loop.workers import WorkerGroup
from align_cluster.observe.guards import Guard
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import MetricWriter, earlier, flat
from align_cluster.observe.trackers import TRACKERS
from align_cluster.observe.trackers.base import TrackedRun
from align_cluster.observe.trackers.feed import Feed


def feeds(config: RunConfig, run: RunDir, resumed: bool, note: Callable[[str], None]) -> list[Feed]:
    """Start the trackers of a run, each with a thread of its own. A tracker that is new to a resumed run gets its
    earlier steps."""
    if not config.track:
        return []
    settings = dict(flat(config.model_dump(mode="json")))
    tracked = TrackedRun(run.path, settings, tuple(config.rewards), meters.gauge, meters.addresses)
    rows = earlier(run) if resumed else []
    return [Feed(one.kind, TRACKERS[one.kind](one), tracked, rows, note) for one in config.track]


def live(config: RunConfig, metrics: MetricWriter, clock: Clock, workers: WorkerGroup, guard: Guard) -> None:
    """Hand what the run does now to the trackers of live values. Another thread calls it, every few seconds."""
    values = {
        "run/step": float(clock.number),
        "run/steps": float(config.steps),
        "run/step_began_at": time.time() - (time.monotonic() - clock.step_began),
    }
    values |= {f"workers/{group.name}/lost": float(group.lost) for group in workers.groups}
    for pool in (workers.samplers, *workers.rewards):
        values[f"workers/{pool.name}/ready"] = float(len(pool.ready_workers))
        values[f"workers/{pool.name}/started"] = float(pool.started)
    streaks = dict(guard.streaks)  # a copy, since the loop adds to it
    values |= {f"guard/{rule}/broken": float(streaks.get(rule, 0)) for rule in guard.rules}
    metrics.live(clock.number, values)
