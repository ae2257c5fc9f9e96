"""What is gained by drawing one step ahead (`loop.ahead`)? Steps of the real driver, with ahead 0 and with 1.

    python benchmarks/pipeline.py embedded    # the embedded model: a sampler on one core, the learner on another
    python benchmarks/pipeline.py standins    # workers that sleep, for several splits of their work
    python benchmarks/pipeline.py standins --split 2:1 --rewards slow    # one of them
    python benchmarks/pipeline.py table       # the kept figures as Markdown

Each call adds what it has measured to results/pipeline.json. See standins.py for what is real beside them.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from common import commit, machine
from standins import OF_STANDINS, standins

from align_cluster.config.load import load
from align_cluster.config.run import RunConfig
from align_cluster.loop import driver
from align_cluster.observe.sinks import read_jsonl

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "pipeline.json"
LONGER_S = 4.0  # seconds of a step's longer part: long against what the driver and Ray take on two cores
SPLITS = {"1:1": (1, 1), "1:2": (1, 2), "1:4": (1, 4), "2:1": (2, 1), "4:1": (4, 1)}  # work of drawing : training
REWARDS = {"quick": 0.05, "slow": 1.0}  # seconds of all scores of a step, over those of its drawing
SAMPLERS, CHUNKS, CHUNK = 2, 8, 12
IMAGES = CHUNKS * CHUNK
LEFT_OUT = 1  # steps at the start, which begin with nothing drawn, and at the end, which draw nothing more
OVERRIDES = (
    *OF_STANDINS,
    "name=pipeline",
    "prompts_per_step=8",
    "rollout.group_size=12",
    f"rollout.chunk={CHUNK}",
    f"learner.micro_batch={CHUNK}",
)


def steps_of(config: RunConfig) -> list[dict[str, float]]:
    """Run a config, and return the rows of the steps in the middle of it."""
    with tempfile.TemporaryDirectory() as folder:
        rows = read_jsonl(driver.train(config, Path(folder)) / "metrics.jsonl")
    return rows[LEFT_OUT : len(rows) - LEFT_OUT]


def compare(overrides: tuple[str, ...], steps: int) -> dict[str, Any]:
    """Return seconds a step, and what share of it each pool waits, without and with one step ahead."""
    found: dict[str, Any] = {}
    for ahead in (0, 1):
        given = (*overrides, f"loop.ahead={ahead}", f"steps={steps + 2 * LEFT_OUT}")
        rows = steps_of(load(ROOT / "configs/quickstart.yaml", given))
        names = ("time/step", "time/publish", "weights/adopt_s", "idle/samplers", "idle/learners", "idle/rewards")
        found[f"ahead {ahead}"] = {name: statistics.median(row[name] for row in rows) for name in names}
    return found | {"gain": found["ahead 0"]["time/step"] / found["ahead 1"]["time/step"]}


def bench_standins(split: str, rewards: str, steps: int) -> dict[str, Any]:
    """Measure one split. `bound` is the shortest step that one step ahead can have."""
    draw, train = (LONGER_S * part / max(SPLITS[split]) for part in SPLITS[split])
    score = REWARDS[rewards] * draw
    with standins(draw * SAMPLERS / IMAGES, train, score / IMAGES):
        found = compare((*OVERRIDES, f"cluster.samplers={SAMPLERS}"), steps)
    last = score / CHUNKS  # from the last image to the last score, where scoring keeps up
    sync = found["ahead 1"]["time/publish"] + found["ahead 1"]["weights/adopt_s"]
    found["bound"] = max(draw + last, train) + sync
    found["over_bound"] = found["ahead 1"]["time/step"] / found["bound"] - 1
    return found | {"draw_s": draw, "train_s": train, "score_s": score}


def keep(part: str, key: str, found: dict[str, Any]) -> None:
    """Add figures to the results, with where they were measured."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    about = {"date": date.today().isoformat(), "commit": commit(), "machine": machine(), "load": os.getloadavg()[0]}
    known.setdefault(part, {})[key] = found | about
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def table(known: dict[str, Any]) -> Iterator[str]:
    """Yield the figures as Markdown."""
    titles = ("draw : train", "rewards", "ahead 0, s a step", "ahead 1", "gain", "over the bound")
    yield f"| {' | '.join(titles)} | samplers wait | learner waits |"
    yield "|---|---|---|---|---|---|---|---|"
    for key, row in known.get("standins", {}).items():
        split, rewards = key.split()
        yield f"| {split} | {rewards} | {_cells(row)} | {row['over_bound']:+.0%} | {_waits(row)} |"
    for row in known.get("embedded", {}).values():
        yield f"| embedded model | its own | {_cells(row)} | | {_waits(row)} |"


def _cells(row: dict[str, Any]) -> str:
    first, second = (row[f"ahead {ahead}"]["time/step"] for ahead in (0, 1))
    return f"{first:.2f} | {second:.2f} | {row['gain']:.2f} x"


def _waits(row: dict[str, Any]) -> str:
    pairs = ([row[f"ahead {ahead}"][f"idle/{pool}"] for ahead in (0, 1)] for pool in ("samplers", "learners"))
    return " | ".join(f"{first:.0%} -> {second:.0%}" for first, second in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["embedded", "standins", "table"])
    parser.add_argument("--split", choices=SPLITS, help="of the stand-ins' work (default: all)")
    parser.add_argument("--rewards", choices=REWARDS, help="how long the stand-ins score (default: both)")
    parser.add_argument("--steps", type=int, default=4, help="steps that are measured with each setting")
    args = parser.parse_args()
    if args.what == "embedded":
        keep("embedded", "nft", compare(("cluster.samplers=1", "cluster.learners=1", "evaluate.count=2"), args.steps))
    if args.what == "standins":
        for split in [args.split] if args.split else SPLITS:
            for rewards in [args.rewards] if args.rewards else REWARDS:
                keep("standins", f"{split} {rewards}", bench_standins(split, rewards, args.steps))
    print("\n".join(table(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
