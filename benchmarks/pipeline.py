"""What is gained by drawing one step ahead (`loop.ahead`)? Steps of the real driver, with ahead 0 and with 1.

    python benchmarks/pipeline.py embedded    # the embedded model: a sampler on one core, the learner on another
    python benchmarks/pipeline.py standins    # workers that sleep, for several splits of their work
    python benchmarks/pipeline.py standins --split 2:1 --rewards slow    # one of them
    python benchmarks/pipeline.py table       # the kept figures as Markdown

Each call adds what it has measured to results/pipeline.json. A stand-in sleeps where a real worker computes; all else
is real: the driver, the pools, Ray's object store, and the sizes of what goes through it, which are those of Stable
Diffusion 3.5 Medium at 512 px (images, final latents, conditions, a LoRA of rank 32).
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ray
from common import commit, machine

from align_cluster.cluster import learners
from align_cluster.config.load import load
from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import RankMetric, StepWork
from align_cluster.learner.state import Snapshot
from align_cluster.loop import driver, workers
from align_cluster.observe.sinks import read_jsonl
from align_cluster.rollouts.sampler import DrawRequest, fingerprint, keys_of
from align_cluster.types import Chunk, Condition, DrawInfo, Manifest, Prompt, Receipt, Record, Scores
from align_cluster.weights import checksum, publish

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "pipeline.json"
LONGER_S = 4.0  # seconds of a step's longer part: long against what the driver and Ray take on two cores
SPLITS = {"1:1": (1, 1), "1:2": (1, 2), "1:4": (1, 4), "2:1": (2, 1), "4:1": (4, 1)}  # work of drawing : training
REWARDS = {"quick": 0.05, "slow": 1.0}  # seconds of all scores of a step, over those of its drawing
SAMPLERS, CHUNKS, CHUNK = 2, 8, 12
LEFT_OUT = 1  # steps at the start, which begin with nothing drawn, and at the end, which draw nothing more
LORA = 18_800_000  # parameters, fp32
OVERRIDES = (
    "name=pipeline",
    "prompts_per_step=8",
    "rollout.group_size=12",
    f"rollout.chunk={CHUNK}",
    f"learner.micro_batch={CHUNK}",
    "learner.updates_per_step=1",
    "rewards={jpeg: {kind: jpeg}}",
    "checkpoint.every=0",
    "cluster.learners=1",
    "evaluate.every=0",
    "evaluate.grid_every=0",
    "evaluate.count=2",
    "evaluate.images_per_prompt=1",
    "evaluate.grid_prompts=1",
    "evaluate.grid_columns=1",
)


class SleepingSampler:
    """Draws black images in a given time for each."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds

    def encode(self, texts: list[str]) -> list[Condition]:
        keys = [hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in texts]
        return [Condition(key, np.zeros((333, 4096), np.float16), np.zeros(2048, np.float16)) for key in keys]

    def adopt(self, manifest: Manifest, buffer: np.ndarray) -> Receipt:
        return Receipt(self.name, manifest.version, len(manifest.tensors), checksum(buffer), 0.0)

    def draw_chunk(self, chunk: Chunk, null: Any, request: DrawRequest, *encodings: Condition) -> tuple:
        time.sleep(self.seconds * len(chunk))
        asked = fingerprint(chunk, request, keys_of(dict(zip(chunk.texts, encodings, strict=True))), {})
        x0, indices = np.zeros((len(chunk), 16, 64, 64), np.float32), np.empty((len(chunk), 0), np.int64)
        record = Record(chunk, request.version, x0, np.linspace(1, 0, request.steps + 1), indices)
        return DrawInfo(chunk, request.version, asked, 0.0), np.zeros((len(chunk), 512, 512, 3), np.uint8), record

    def lora_file(self, manifest: Manifest, buffer: np.ndarray) -> tuple[str, bytes]:
        return "pytorch_lora_weights.safetensors", buffer[:1024].tobytes()


class SleepingReward:
    """Scores images in a given time for each."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def score_chunks(self, prompts: list[list[Prompt]], starts: list[int], *images: np.ndarray) -> list[Scores]:
        time.sleep(self.seconds * sum(map(len, prompts)))
        sizes = [len(own) for own in prompts]
        return [Scores({"jpeg": np.arange(n) / n}, {"jpeg": np.ones(n, bool)}, {}, {}, {"jpeg": 0.1}) for n in sizes]


class SleepingRank:
    """Trains on a step in a given time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.updates, self.lora = seconds, 0, {"lora": np.zeros(LORA, np.float32)}

    def address(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def build(self, *arguments: Any) -> None:
        pass

    def update(self, work: StepWork, null: Any, *data: Any) -> tuple[dict[str, RankMetric], Snapshot]:
        time.sleep(self.seconds)
        self.updates += 1
        self.lora["lora"][:100] += 1.0
        state = Snapshot.of({"updates": self.updates, "steps": self.updates}, {"adapter/default/a": np.zeros(1)})
        return {"loss": RankMetric(0.0, 1.0, 0.0), "seconds": RankMetric(self.seconds, 1.0, self.seconds)}, state

    def publish(self, source: str, version: int) -> tuple[Manifest, np.ndarray]:
        return publish(self.lora, version)


@contextmanager
def standins(draw_s: float, train_s: float, score_s: float) -> Iterator[None]:
    """Let a run's workers sleep: for so many seconds for a step's drawing by all samplers, training, and scoring."""
    images = CHUNKS * CHUNK

    def actor(kind: type, *arguments: Any) -> Any:
        return ray.remote(kind).options(num_cpus=0).remote(*arguments)

    def sampler(config: Any, plan: Any, place: Any, name: str) -> Any:
        return actor(SleepingSampler, name, draw_s * SAMPLERS / images)

    with (
        mock.patch.object(workers, "make_sampler", sampler),
        mock.patch.object(workers, "make_reward_worker", lambda *_: actor(SleepingReward, score_s / images)),
        mock.patch.object(learners, "make_learner_rank", lambda *_: actor(SleepingRank, train_s)),
    ):
        yield


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
    with standins(draw, train, score):
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
