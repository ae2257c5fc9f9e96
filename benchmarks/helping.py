"""Would samplers that wait help the learner? DiffusionNFT with `loop.ahead: 1`, from counted FLOPs and measured times.

    python benchmarks/helping.py count      # Stable Diffusion 3.5 Medium on 2 to 32 GPUs, in FLOPs
    python benchmarks/helping.py measure    # the embedded model: what the passes take, and what moving them takes
    python benchmarks/helping.py table      # the kept figures as Markdown

DiffusionNFT's loss needs three predictions at each level that an update visits: the policy's, its lagged copy's and the
base's. The last two have no gradient and depend on weights that samplers hold, so samplers without work could compute
them. That evens out a split of whole GPUs between the pools; it takes no work away. Each call adds to
results/helping.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import ray
from common import commit, machine

from align_cluster.config.load import load
from align_cluster.config.plan import Rows, derive
from align_cluster.config.split import Pair, best_split, step_time
from align_cluster.loop import driver
from align_cluster.observe.sinks import read_jsonl
from align_cluster.planner.memory import measure
from align_cluster.planner.report import image_flops

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "helping.json"
GPUS = (2, 3, 4, 6, 8, 16, 32)
MEASURED = 4  # steps of each run, after one that is left out
MOVED = 256 << 20  # bytes


def helped(work: tuple[float, float, float], workers: Pair) -> float:
    """Return the shortest step of a split in which samplers take over any share of the passes, to the last image.

    `work` is what one worker takes for a step's drawing, its training, and the part of training that can be moved.
    """
    draw, train, passes = work
    samplers, learners = workers
    even = (train / learners - draw / samplers) / (passes / learners + passes / samplers)
    share = min(max(even, 0.0), 1.0)
    return max((draw + share * passes) / samplers, (train - share * passes) / learners)


def count() -> dict[str, Any]:
    """Compare, for numbers of GPUs, the best step without help and the best one with it, in steps of one GPU."""
    flops = {}
    for beta in (0, 1e-4):
        config = load(ROOT / "configs/sd35_medium_nft.yaml", [f"algorithm.kl_beta={beta}"])
        plan = derive(config, 16, 2, Rows())
        flops[beta] = image_flops(plan.config, plan, measure(plan.config, plan, "cuda", alternatives=False))
    draw, train = flops[1e-4]["rollout"], flops[1e-4]["update"]
    passes = 2 * (train - flops[0]["update"])  # the lagged copy's pass is as long as the base's
    whole = draw + train
    work, rows = (draw / whole, train / whole), {}
    for gpus in GPUS:
        split = best_split(work, plan.pieces, gpus)
        pieces = (min(gpus, plan.pieces[0]), min(gpus, plan.pieces[1]))
        found = {
            "split": split,
            "turns": step_time(work, plan.pieces, pieces, ahead=False),
            "apart": step_time(work, plan.pieces, split),
            "helped": min(helped((*work, passes / whole), (s, gpus - s)) for s in range(1, gpus)),
        }
        rows[str(gpus)] = found | {"best": min(found["turns"], found["apart"])}
    latent = 16 * (config.backbone.height // 8) * (config.backbone.width // 8) * 2  # bytes in bf16
    moved = plan.images_per_step * plan.inner_passes * 2 * latent
    return {"work": work, "passes": passes / whole, "moved_bytes": moved, "gpus": rows}


def timed() -> dict[str, float]:
    """Measure a step's drawing, its training with and without the passes, and the object store."""
    found = {}
    for name, without in (("train_s", ()), ("bare_s", ("algorithm.kl_beta=0", "algorithm.old=on_policy"))):
        given = ("cluster.samplers=1", "cluster.learners=1", "evaluate.count=2", f"steps={MEASURED + 1}", *without)
        with tempfile.TemporaryDirectory() as folder:
            config = load(ROOT / "configs/quickstart.yaml", [*given, "evaluate.every=0", "evaluate.grid_every=0"])
            rows = read_jsonl(driver.train(config, Path(folder)) / "metrics.jsonl")[1:]
        found[name] = statistics.median(row["time/update"] for row in rows)
        found.setdefault("draw_s", statistics.median(row["time/rollout"] for row in rows))
    work = (found["draw_s"], found["train_s"], found["train_s"] - found["bare_s"])
    ray.init(num_cpus=1, log_to_driver=False, include_dashboard=False)
    data, began = np.ones(MOVED, np.uint8), time.perf_counter()
    ray.get(ray.put(data)).sum()
    found["store_bytes_per_s"] = MOVED / (time.perf_counter() - began)
    ray.shutdown()
    return found | {"apart_s": max(work[:2]), "helped_s": helped(work, (1, 1)), "turns_s": sum(work[:2]) / 2}


def table(known: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    counted = known["count"]
    titles = ("GPUs", "samplers + learners", "apart", "in turns", "apart, helped", "gain over apart", "over both")
    lines = [f"| {' | '.join(titles)} |"]
    lines.append("|---|---|---|---|---|---|---|")
    for gpus, row in counted["gpus"].items():
        times = " | ".join(f"{row[name]:.3f}" for name in ("apart", "turns", "helped"))
        gains = " | ".join(f"{row[best] / row['helped'] - 1:+.0%}" for best in ("apart", "best"))
        lines.append(f"| {gpus} | {' + '.join(map(str, row['split']))} | {times} | {gains} |")
    lines += ["", f"The passes are {counted['passes'] / counted['work'][1]:.0%} of training; a step of theirs takes"]
    lines[-1] += f" {counted['moved_bytes'] / 1e9:.1f} GB through the object store."
    if found := known.get("measure"):
        share = 1 - found["bare_s"] / found["train_s"]
        lines[-1] += (
            f" On the embedded model they are {share:.0%} of training ({found['train_s']:.2f} s a step, drawing "
            f"{found['draw_s']:.2f} s): a sampler and a learner on a core each would take {found['apart_s']:.2f} s, "
            f"helped {found['helped_s']:.2f} s, both in turns on both cores {found['turns_s']:.2f} s. The object store "
            f"wrote and read {found['store_bytes_per_s'] / 1e9:.2f} GB/s."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["count", "measure", "table"])
    what = parser.parse_args().what
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if what != "table":
        about = {"date": date.today().isoformat(), "commit": commit(), "machine": machine()}
        known[what] = (count() if what == "count" else timed()) | about
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(table(known))


if __name__ == "__main__":
    main()
