"""Collects the numbers of one step, and of the whole run, for its records."""

from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.advantage import spread
from align_cluster.cluster.nodes import software
from align_cluster.config.load import config_hash
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.learner.batching import Reduced
from align_cluster.loop.clock import Clock
from align_cluster.loop.rollouts import DrawnChunk
from align_cluster.loop.syncing import Sync
from align_cluster.loop.workers import WorkerGroup
from align_cluster.observe.metrics import LEARNER
from align_cluster.rewards.mix import concatenate
from align_cluster.types import Credit, Scores


def step_metrics(
    config: RunConfig,
    drawn: list[DrawnChunk],
    credit: Credit,
    trained: dict[str, Reduced],
    clock: Clock,
    sync: Sync,
) -> dict[str, float]:
    """Return everything that one step reports, under the names that `observe.metrics` declares. It ends the step's
    time."""
    scores = concatenate([item.scores for item in drawn])
    groups = (config.prompts_per_step, config.group_members)
    tasks = np.array([prompt.task for item in drawn for prompt in item.chunk.prompts])
    values: dict[str, float] = dict(credit.metrics)
    for name in config.rewards:
        valid, reward = scores.valid[name], scores.values[name]
        if valid.any():
            values[f"reward/{name}/mean"] = float(reward[valid].mean())
            values[f"reward/{name}/std"] = float(reward[valid].std())
            within = spread(reward.reshape(groups), valid.reshape(groups))
            values |= {} if np.isnan(within) else {f"reward/{name}/spread": within}
            for task in sorted(set(tasks[valid])):
                values[f"reward/{name}/{task}"] = float(reward[valid & (tasks == task)].mean())
    for name, failure in (item for one in drawn for item in one.scores.failures.items()):
        for key in (f"reward/{name}/failed", f"reward/{name}/failed/{failure.kind}"):
            values[key] = values.get(key, 0.0) + failure.images
    values |= correlations(scores)
    for name in ("contrast", "diversity"):
        found, sizes = zip(*((getattr(item.info, name), item.finite.sum()) for item in drawn), strict=True)
        if any(sizes):
            values[f"images/{name}"] = float(np.average(found, weights=sizes))
    values["rollout/non_finite"] = float(sum(len(item.info.non_finite) for item in drawn))
    for metric in (*LEARNER, *ALGORITHMS[config.algorithm.kind].metrics):
        if metric.source in trained:
            reduced = trained[metric.source]
            values[metric.pattern] = reduced.largest if metric.reduce == "largest" else reduced.mean
    values["weights/bytes"], values["weights/adopt_s"] = float(sync.manifest.nbytes), sync.seconds
    values["weights/version"] = float(sync.manifest.version)
    values["time/step"] = clock.end_step()
    values |= {f"time/{stage}": seconds for stage, seconds in clock.step.items()}
    values["throughput/images_per_s"] = len(tasks) / values["time/step"]
    return values


def correlations(scores: Scores) -> dict[str, float]:
    """Return Pearson's correlation of each two rewards over the images that both have scored, where both vary."""
    found = {}
    for first, second in combinations(scores.values, 2):
        both = scores.valid[first] & scores.valid[second]
        x, y = scores.values[first][both], scores.values[second][both]
        if both.sum() > 2 and x.std() > 0 and y.std() > 0:
            found[f"reward/correlation/{first}/{second}"] = float(np.corrcoef(x, y)[0, 1])
    return found


@dataclass
class Results:
    """Holds what a run has found so far: held-out scores of the base model and of the result, and the self-check."""

    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    self_check: dict[str, float] | None = None

    def check_ratio(self, trained: dict[str, Reduced], tolerance: float) -> None:
        """Check once that the learner's log-probs equal the rollout's while the weights are unchanged.

        Does nothing where the algorithm has no log-probs. Raises UserError where they differ too much.
        """
        if self.self_check or "first_log_ratio" not in trained:
            return
        largest = trained["first_log_ratio"].largest
        if not np.isfinite(largest) or largest > tolerance:
            raise UserError(
                "self-check failed: before the first update the learner's log-probs differ from the rollout's by "
                f"{largest:.2e} (learner.ratio_tolerance is {tolerance:g}): leave learner.micro_batch and "
                "backbone.compile unset so that both compute alike, or set backbone.precision: fp32"
            )
        self.self_check = {"max_abs_log_ratio": largest}


def summary(
    config: RunConfig, results: Results, workers: WorkerGroup, clock: Clock, sync: Sync, lora: Path, resumed: int
) -> dict[str, Any]:
    """Return the content of summary.json: what the run did, how long it took, and what it ended with."""
    wall = clock.wall()
    return {
        "name": config.name,
        "seed": config.seed,
        "steps": config.steps,
        "headline": config.headline,
        "before": results.before,
        "after": results.after,
        "images_drawn": workers.rollouts.images_drawn,
        "images_per_s": workers.rollouts.images_drawn / wall,
        "wall_seconds": wall,
        "stage_seconds": {**clock.total, "start and rest": wall - sum(clock.total.values())},
        "resumed": resumed,
        "lora_path": str(lora),
        "lora_checksum": sync.manifest.checksum,
        "workers_lost": workers.lost,
        "self_check": results.self_check,
        "config_hash": config_hash(config),
        "versions": software(),
    }
