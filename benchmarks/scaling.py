"""How far does the control plane scale? The real driver with 1 to 64 samplers that sleep (see standins.py).

    python benchmarks/scaling.py weak --samplers 1 8 64    # a step grows with the samplers
    python benchmarks/scaling.py flat --steps 200          # memory of the driver and the object store over many steps
    python benchmarks/scaling.py sync --samplers 64        # LoRAs of 38 and 105 MB, to all samplers
    python benchmarks/scaling.py table                     # the kept figures as Markdown

All stand-ins share this machine's cores, memory and object store, which on a cluster each node has to itself: the
figures are lower bounds of what one driver can do. Each call adds to results/scaling.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import ray
from common import commit, machine
from hooked import HookedWorkers
from standins import OF_STANDINS, standins

from align_cluster.cluster.preload import Preload, imports
from align_cluster.config.load import load
from align_cluster.loop import driver
from align_cluster.observe.sinks import read_jsonl

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "scaling.json"
GROUP, CHUNK = 24, 12  # images
IMAGES = 144  # a sampler and step
IMAGE_S = 0.1  # of a sampler for an image: 10 images/s and GPU
TRAIN_S = 2.0
SCORED = 0.02  # of the time of drawing
FIRST = 1  # steps that are left out
LORAS = {"38 MB": 9_500_000, "105 MB": 26_250_000}  # fp32 parameters
OVERRIDES = (
    *OF_STANDINS,
    "name=scaling",
    f"rollout.group_size={GROUP}",
    f"rollout.chunk={CHUNK}",
    f"learner.micro_batch={CHUNK}",
)


class Timed(HookedWorkers):
    """Notes the processor time of the driver's main thread at each update."""

    moments: list[float] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.moments.clear()

    def update(self, *arguments: Any) -> Any:
        self.moments.append(time.thread_time())
        return super().update(*arguments)


def rows(samplers: int, images: int, steps: int, image_s: float, train_s: float, lora: int) -> list[dict[str, float]]:
    """Run steps of `images` with sleeping workers, and return their metrics without the first ones."""
    given = (f"cluster.samplers={samplers}", f"prompts_per_step={images // GROUP}", f"steps={FIRST + steps}")
    config = load(ROOT / "configs/quickstart.yaml", [*OVERRIDES, *given])
    with (
        tempfile.TemporaryDirectory() as folder,
        standins(image_s, train_s, SCORED * image_s / samplers, lora),
        Preload() as ready,
    ):
        ready.load(imports(config))
        return read_jsonl(driver.train(config, Path(folder), preload=ready) / "metrics.jsonl")[FIRST:]


def weak(samplers: int, steps: int) -> dict[str, Any]:
    """Measure a step that grows with its samplers, beside one that takes nothing but its workers' time."""
    images = IMAGES * samplers
    with mock.patch.object(driver, "WorkerGroup", Timed):
        found = rows(samplers, images, steps, IMAGE_S, TRAIN_S, LORAS["38 MB"])
    busy = statistics.median(second - first for first, second in pairwise(Timed.moments))
    seconds = statistics.median(row["time/step"] for row in found)
    ideal = IMAGES * IMAGE_S + TRAIN_S
    sync = statistics.median(row["time/publish"] + row["weights/adopt_s"] for row in found)
    return {
        "images": images,
        "step_s": seconds,
        "of_ideal": ideal / seconds,
        "driver_ms_a_group": 1e3 * busy / (images / GROUP),
        "sync_s": sync,
    }


def flat(steps: int) -> dict[str, Any]:
    """Measure what the driver and the object store hold over many short steps: at a tenth of them, and at the end."""
    with sampled() as seen:
        rows(4, 8 * GROUP, steps, 0.001, 0.05, LORAS["38 MB"])
    early, late = (seen[len(seen) // 10 : len(seen) // 5], seen[-len(seen) // 10 :])
    names = ("driver_mb", "store_mb")
    return {"steps": steps} | {
        name: [statistics.median(one[name] for one in part) for part in (early, late)] for name in names
    }


def sync(samplers: int) -> dict[str, Any]:
    """Measure a LoRA's way from the learner's buffer to the last sampler's receipt."""
    found = {"samplers": samplers}
    for name, lora in LORAS.items():
        known = rows(samplers, 2 * CHUNK * samplers, 4, 0.001, 0.01, lora)
        found[name] = statistics.median(row["time/publish"] + row["weights/adopt_s"] for row in known)
    return found


@contextmanager
def sampled() -> Iterator[list[dict[str, float]]]:
    """Yield a list that gets, each second, the megabytes of this process and of the object store."""
    seen: list[dict[str, float]] = []
    over, own = threading.Event(), psutil.Process()

    def watch() -> None:
        while not over.wait(1.0):
            if ray.is_initialized():
                total, left = (all_of.get("object_store_memory", 0.0) for all_of in _store())
                seen.append({"driver_mb": own.memory_info().rss / 1e6, "store_mb": (total - left) / 1e6})

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _store() -> tuple[dict[str, float], dict[str, float]]:
    return ray.cluster_resources(), ray.available_resources()


def table(known: dict[str, Any]) -> Iterator[str]:
    """Yield the figures as Markdown."""
    yield "| samplers | images a step | s a step | of the ideal | driver, ms a group | sync of 38 MB |"
    yield "|---|---|---|---|---|---|"
    for samplers, row in sorted(known.get("weak", {}).items(), key=lambda item: int(item[0])):
        cells = f"{row['images']:,} | {row['step_s']:.2f} | {row['of_ideal']:.3f} | {row['driver_ms_a_group']:.1f}"
        yield f"| {samplers} | {cells} | {1e3 * row['sync_s']:.0f} ms |"
    for row in known.get("sync", {}).values():
        times = ", ".join(f"{name} {1e3 * row[name]:.0f} ms" for name in LORAS)
        yield f"\nLoRA to {row['samplers']} samplers: {times}."
    for row in known.get("flat", {}).values():
        yield f"\nOver {row['steps']} steps, at a tenth and at the end: " + ", ".join(
            f"{what} {row[name][0]:.0f} and {row[name][1]:.0f} MB"
            for name, what in (("driver_mb", "driver"), ("store_mb", "object store"))
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["weak", "flat", "sync", "table"])
    parser.add_argument("--samplers", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--steps", type=int, help="measured steps (default: 3, and 200 of `flat`)")
    args = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def keep(key: str, found: dict[str, Any]) -> None:
        about = {"date": date.today().isoformat(), "commit": commit(), "machine": machine(), "load": os.getloadavg()[0]}
        known.setdefault(args.what, {})[key] = found | about
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")

    if args.what == "flat":
        keep("4", flat(args.steps or 200))
    for samplers in args.samplers if args.what in ("weak", "sync") else ():
        keep(str(samplers), weak(samplers, args.steps or 3) if args.what == "weak" else sync(samplers))
    print("\n".join(table(known)))


if __name__ == "__main__":
    main()
