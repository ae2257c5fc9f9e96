"""Does memory stay flat over many prompts? The path of a run's conditions, with real samplers, on Ray.

    python benchmarks/conditions.py            # 20,000 prompts, caches that hold about 2,000 of them: minutes
    python benchmarks/conditions.py --quick    # a check that it works

Each step has 48 prompts that no step had before. The samplers learn their perturbed conditions (E2PO with K = 2 and
one iteration) and encode them, the driver keeps references, and a reader takes all of them as a learner rank does. Once
the caches are full, memory of the driver and the samplers, the object store and the folder on disk are measured at each
tenth of the prompts. Results go to benchmarks/results/conditions.json, the table to stdout as Markdown.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from common import commit, machine

from align_cluster.cluster.pool import Pool
from align_cluster.conditions.cache import VARIABLE
from align_cluster.config.load import load
from align_cluster.config.run import RunConfig
from align_cluster.files import write_json
from align_cluster.loop.conditions import GIB, ConditionStore
from align_cluster.rollouts.guidance import TextBatch
from align_cluster.rollouts.sampler import Sampler
from align_cluster.types import Condition, Perturbation, Prompt

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "conditions.json"
STEP = 48  # prompts a step
IN_STORE = (
    17_424  # bytes of a prompt: a condition [16, 192] and [192], a perturbation [1, 16, 64] and [1, 64], and more
)
ON_DISK = 24_576  # bytes of both files, in blocks of 4 KiB
MIB = 2**20


class Reader:
    """Reads a step's conditions, as the learner does."""

    def read(self, count: int, *records: Condition | Perturbation) -> tuple[int, ...]:
        """Return the size of the batch that `count` conditions make; perturbations follow them."""
        return tuple(TextBatch.build(list(records[:count]), None, torch.device("cpu")).sequence.shape)


def own_memory() -> float:
    """MiB of this process alone, without the object store's pages."""
    used = psutil.Process().memory_info()
    return round((used.rss - used.shared) / MIB, 1)


def taken(folder: Path) -> int:
    """Bytes that files take on disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*.npz"))


def measure(done: int, store: ConditionStore, samplers: Pool, cache: Path) -> dict[str, Any]:
    time.sleep(1.5)  # Ray frees objects, and reports it, within a second
    memory = [ray.cluster_resources(), ray.available_resources()]
    calls = [worker.actor.__ray_call__.remote(lambda _: own_memory()) for worker in samplers.workers]
    return {
        "prompts": done,
        "driver_rss_mib": round(psutil.Process().memory_info().rss / MIB, 1),
        "driver_own_mib": own_memory(),
        "samplers_own_mib": sum(ray.get(calls)),
        "object_store_mib": round((memory[0]["object_store_memory"] - memory[1]["object_store_memory"]) / MIB, 2),
        "disk_mib": round(taken(cache) / MIB, 2),
        "kept": len(store.recent.spare) + sum(len(kind) for kind in store.recent.needed.values()),
    }


def run(config: RunConfig, count: int, fit: int, cache: Path) -> Iterator[dict[str, Any]]:
    """Send `count` prompts through a store; yield what is measured at every tenth, from the second full cache on."""
    actor, reader = ray.remote(Sampler).options(num_cpus=0.5), ray.remote(Reader).options(num_cpus=0.5).remote()
    samplers = Pool("sampler", lambda name, index: actor.remote(config.backbone, 1, name), 2, timeout_s=600)
    samplers.wait_until(lambda: len(samplers.ready_workers) == samplers.size)
    store, due, seconds = ConditionStore(config, samplers), max(2 * fit, count // 10), 0.0
    for first in range(0, count, STEP):
        began = time.perf_counter()
        numbers = range(first, min(first + STEP, count))
        prompts = [Prompt(number, f"a photo of {number} red circles") for number in numbers]
        store.explore(prompts, 0)
        store.encode(prompts)
        references = [store.of(prompt.text) for prompt in prompts]
        references += [store.perturbed_of(prompt.text).reference for prompt in prompts]
        assert ray.get(reader.read.remote(len(prompts), *references))[0] == len(prompts)
        del references
        seconds += time.perf_counter() - began
        done = first + len(prompts)
        if done >= due or done == count:
            due = done + count // 10
            yield measure(done, store, samplers, cache) | {"ms_a_prompt": round(1000 * seconds / done, 2)}
    samplers.shutdown()


def printed(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Print rows as they come, and pass them on."""
    print("| prompts | driver, MiB (of it its own) | samplers, MiB | object store, MiB | disk, MiB | ms a prompt |")
    print("|---|---|---|---|---|---|", flush=True)
    for row in rows:
        driver = f"{row['driver_rss_mib']} ({row['driver_own_mib']})"
        rest = f"{row['samplers_own_mib']:.1f} | {row['object_store_mib']} | {row['disk_mib']} | {row['ms_a_prompt']}"
        print(f"| {row['prompts']} | {driver} | {rest} |", flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="960 prompts, caches that hold 96")
    parser.add_argument("--fit", type=int, help="prompts that the caches hold (default: 2000)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    count, fit = 960 if args.quick else 20_000, args.fit or (96 if args.quick else 2000)
    exploration = ("exploration.kind=e2po", "exploration.conditions=2", "exploration.iterations=1")
    bound = f"cluster.condition_cache_gib={fit * IN_STORE / GIB}"
    config = load(ROOT / "configs" / "quickstart.yaml", [*exploration, bound])
    with tempfile.TemporaryDirectory(prefix="ac-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cache = Path(folder, "cache")
        os.environ |= {"ALIGN_CLUSTER_CACHE": str(cache), VARIABLE: str(fit * ON_DISK / GIB)}
        os.environ.pop("RAY_ADDRESS", None)
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        size = max(100_000_000, 2 * fit * IN_STORE)
        ray.init("local", num_cpus=2, object_store_memory=size, _temp_dir=f"{folder}/ray", **options)
        rows = list(printed(run(config, count, fit, cache)))
        ray.shutdown()
    found = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "prompts": count,
        "fit": fit,
        "store_bound_mib": round(fit * IN_STORE / MIB, 2),
        "disk_bound_mib": round(fit * ON_DISK / MIB, 2),
        "rows": rows,
    }
    args.out.parent.mkdir(exist_ok=True)
    write_json(args.out, found)


if __name__ == "__main__":
    main()
