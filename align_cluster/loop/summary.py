"""Numbers of one step and of the software, for the run's records."""

from importlib.metadata import PackageNotFoundError, version

import numpy as np

from align_cluster import __version__
from align_cluster.config.run import RunConfig
from align_cluster.loop.crew import Drawn
from align_cluster.types import Credit, Manifest, Scores

# Learner metrics whose largest magnitude says more than their mean.
LARGEST = {
    "log_ratio": "train/log_ratio_max",
    "first_log_ratio": "train/first_log_ratio_max",
    "grad_norm": "train/grad_norm",
}
MEAN = {
    "loss": "train/loss",
    "kl": "train/kl",
    "clip_high": "train/clip_high",
    "clip_low": "train/clip_low",
    "old_gap": "train/old_gap",
    "lr": "lr",
    "seconds": "time/learner",
}


def step_metrics(
    config: RunConfig,
    drawn: list[Drawn],
    scores: Scores,
    credit: Credit,
    trained: dict[str, tuple[float, float]],
    times: dict[str, float],
    manifest: Manifest,
    adopted: float,
) -> dict[str, float]:
    """Everything that one step reports, under the names of `observe.metrics`."""
    tasks = np.array([item.info.chunk.prompt.task for item in drawn for _ in item.info.chunk.seeds])
    values: dict[str, float] = dict(credit.metrics)
    for name in config.rewards:
        valid, reward = scores.valid[name], scores.values[name]
        if valid.any():
            values[f"reward/{name}/mean"] = float(reward[valid].mean())
            for task in sorted(set(tasks[valid])):
                values[f"reward/{name}/{task}"] = float(reward[valid & (tasks == task)].mean())
        if name in scores.failures:
            values[f"reward/{name}/failed"] = float((~valid).sum())
    values |= {LARGEST[name]: largest for name, (_, largest) in trained.items() if name in LARGEST}
    values |= {MEAN[name]: mean for name, (mean, _) in trained.items() if name in MEAN}
    values |= {f"time/{stage}": seconds for stage, seconds in times.items()}
    values["time/step"] = sum(times.values())
    values["throughput/images_per_s"] = len(tasks) / values["time/step"]
    values["weights/bytes"], values["weights/adopt_s"] = float(manifest.nbytes), adopted
    values["weights/version"] = float(manifest.version)
    return {name: value for name, value in values.items() if np.isfinite(value)}


def software() -> dict[str, str]:
    """Versions of what decides a result."""
    versions = {"align_cluster": __version__}
    for package in ("torch", "ray", "deepspeed", "diffusers", "transformers", "peft", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
