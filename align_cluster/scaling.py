"""Scaling experiments: short runs of one job on more and more nodes of a cluster, and what each of these nodes brings.

With weak scaling a step grows with the nodes, by its prompts; with strong scaling it stays as it is. Workers that the
run file counts grow with the nodes in both, because a count says what one node holds; those that it leaves open are
planned from the nodes' resources.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from align_cluster.cluster import private
from align_cluster.cluster.nodes import software
from align_cluster.cluster.placement import cluster, nodes, plan_run, resources
from align_cluster.cluster.preload import Preload
from align_cluster.config.load import config_hash
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError, counted
from align_cluster.files import read_json, write_json, write_text
from align_cluster.loop import driver
from align_cluster.observe.charts import Series, line_chart
from align_cluster.observe.sinks import read_jsonl

FIRST = 1  # steps at the start that are left out: they wait for workers that are still starting
WORKERS = ("samplers", "learners", "reward_workers")
POOLS = ("samplers", "learners", "rewards")
Load = Callable[[list[str]], RunConfig]


def overrides(config: RunConfig, count: int, weak: bool, steps: int) -> list[str]:
    """Return the settings in which a short run on `count` nodes differs from the run file, as `--set` takes them."""
    ahead = config.loop.ahead != 0  # its last step draws nothing more
    changed: dict[str, Any] = {"steps": FIRST + steps + ahead, "checkpoint.every": 0}
    changed |= {"evaluate.every": 0, "evaluate.grid_every": 0, "evaluate.count": 1, "evaluate.images_per_prompt": 1}
    changed |= {"evaluate.grid_prompts": 1, "evaluate.grid_columns": 1, "name": f"nodes-{count}"}
    if weak:
        changed["prompts_per_step"] = config.prompts_per_step * count
    workers = config.cluster
    for name in ("samplers", "max_samplers", "learners", "reward_workers"):
        if stated := getattr(workers, name):
            changed[f"cluster.{name}"] = stated * count
    for name, reward in config.rewards.items():
        if reward.pool:
            changed[f"rewards.{name}.pool.workers"] = reward.pool.workers * count
            if reward.pool.max_workers:
                changed[f"rewards.{name}.pool.max_workers"] = reward.pool.max_workers * count
    return [f"{name}={value}" for name, value in changed.items()]


def on_this_machine(config: RunConfig) -> bool:
    """Return whether nothing names a cluster, so that the nodes are Rays of this machine."""
    return not (config.cluster.address or os.environ.get("RAY_ADDRESS"))


def experiment(
    load: Load, counts: Sequence[int], weak: bool, steps: int, folder: Path, preload: Preload | None = None
) -> dict[str, Any]:
    """Run the job that `load` reads, with overrides, on each number of nodes; return what `folder` then holds.

    What the folder has already is not run again. Without `cluster.address` the nodes are Rays of this machine. Raises
    UserError where the folder is of another experiment, or where the cluster has too few nodes.
    """
    config, file = load([]), folder / "scale.json"
    about = {"job": config_hash(config), "weak": weak, "steps": steps, "software": software()}
    found = read_json(file) or about | {"nodes": {}}
    if differs := [name for name in about if found.get(name) != about[name]]:
        raise UserError(
            f"{file} is of another experiment ({' and '.join(differs)} differ); name another folder with --out, or "
            "remove it"
        )
    left = [count for count in counts if str(count) not in found["nodes"]]
    if left:
        several = private.several(max(counts), preload) if on_this_machine(config) else nullcontext()
        with several, cluster(config.cluster, preload):
            order = _order(max(counts), config)
            for count in left:
                ids = [node["NodeID"] for node in order[:count]]
                point = load([*overrides(config, count, weak, steps), f"cluster.nodes={ids}"])
                found["nodes"][str(count)] = measure(point)
                found["nodes"] = dict(sorted(found["nodes"].items(), key=lambda item: int(item[0])))
                write_json(file, found)
    write_text(folder / "scale.svg", chart(found))
    return found


def _order(most: int, config: RunConfig) -> list[dict[str, Any]]:
    """Return the nodes in the order in which they are added: those with most GPUs and cores first, then by name."""
    there = nodes(config.cluster.nodes)
    if len(there) < most:
        raise UserError(f"--nodes {most}: the cluster has {counted(len(there), 'node')}; ask for at most {len(there)}")

    def key(node: dict[str, Any]) -> tuple[float, float, str, str]:
        has = node["Resources"]
        return -has.get("GPU", 0), -has.get("CPU", 0), node["NodeManagerHostname"], node["NodeID"]

    return sorted(there, key=key)


def measure(config: RunConfig) -> dict[str, Any]:
    """Run one point of an experiment, and return its workers, and medians over its steps."""
    plan = plan_run(config, *resources(config.cluster))
    with tempfile.TemporaryDirectory() as folder:
        rows = read_jsonl(driver.train(config, Path(folder)) / "metrics.jsonl")
    rows = rows[FIRST : len(rows) - (config.loop.ahead != 0)]

    def median(name: str) -> float:
        return statistics.median(row[name] for row in rows)

    seconds = median("time/step")
    return {
        **{name: getattr(plan, name) for name in WORKERS},
        "images": plan.images_per_step,
        "step_s": seconds,
        "images_per_s": plan.images_per_step / seconds,
        "sync_s": median("time/publish") + median("weights/adopt_s"),
        "idle": {pool: median(f"idle/{pool}") for pool in POOLS},
    }


def efficiency(found: dict[str, Any]) -> dict[int, float]:
    """Return, for each number of nodes, its images a second and node over those of the smallest number."""
    rates = {int(count): point["images_per_s"] / int(count) for count, point in found["nodes"].items()}
    return {count: rate / rates[min(rates)] for count, rate in rates.items()}


def table(found: dict[str, Any]) -> Table:
    """Return an experiment as a table."""
    title = f"{'weak' if found['weak'] else 'strong'} scaling"
    titled = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for title in ("nodes", "workers", "images", "s/step", "images/s", "efficiency", "sync ms", "wait %"):
        titled.add_column(title, justify="right")
    shares = efficiency(found)
    for count, point in found["nodes"].items():
        titled.add_row(
            count,
            "/".join(str(point[name]) for name in WORKERS),
            str(point["images"]),
            f"{point['step_s']:.2f}",
            f"{point['images_per_s']:.1f}",
            f"{shares[int(count)]:.2f}",
            f"{1e3 * point['sync_s']:.0f}",
            "/".join(f"{100 * point['idle'][pool]:.0f}" for pool in POOLS),
        )
    titled.caption = "workers, and how much of a step they wait: samplers/learners/rewards"
    return titled


def chart(found: dict[str, Any]) -> str:
    """Draw images a second over nodes, beside those of a cluster that loses nothing, as SVG."""
    rates = {int(count): point["images_per_s"] for count, point in found["nodes"].items()}
    first = min(rates)
    ideal = [(count, rates[first] * count / first) for count in rates]
    lines = [Series("measured", list(rates.items())), Series("ideal", ideal, "muted")]
    return line_chart(lines, (420, 240), from_zero=True, x_label="nodes", y_label="images/s")
