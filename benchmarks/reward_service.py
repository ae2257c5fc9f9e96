"""What do scores cost beside the reward model itself, inside a job and as a service; and what if a replica dies?

    python benchmarks/reward_service.py run                  # both parts, on an otherwise idle machine
    python benchmarks/reward_service.py run --part kill      # one part; the other one's figures stay
    python benchmarks/reward_service.py run --quick          # a check that it works; nothing is kept
    python benchmarks/reward_service.py table

clients  the same 512 px images scored by the bare model in a loop, by a job's pool of one worker, and by a service with
         one replica, in turns; then the service with 1 to 32 clients
kill     a service with two replicas under steady load, one of which is killed while it scores

The model is a CLIP ViT-B/32 of random weights in fp32, with one thread wherever it runs. The bare model, the job's
worker, the replica, the HTTP side and the clients, who pack their PNGs, are processes of one machine: what the
clients cost counts too, where there is no core left for it. Results go to benchmarks/results/reward_service.json.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from common import commit, free_port, machine
from reward_load import (
    BATCH,
    IMAGES,
    REQUEST,
    Batch,
    bare,
    checkpoint,
    disturbance,
    figures,
    forwards,
    in_turn,
    medians,
    packing,
    piece,
    process,
    steadily,
    wrong,
)

from align_cluster.cluster.actors import make_reward_worker
from align_cluster.cluster.nodes import software
from align_cluster.cluster.placement import cluster
from align_cluster.cluster.pool import Pool, stream
from align_cluster.config.load import load
from align_cluster.config.plan import derive
from align_cluster.config.run import ClusterConfig
from align_cluster.rewards.clip_score import ClipScore
from align_cluster.rewards.worker import RewardWorker
from align_cluster.serving import service
from align_cluster.serving.config import DeploymentConfig, Limits, ServiceConfig
from align_cluster.types import Prompt, Scores

# isort: split
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

RESULTS = Path(__file__).parent / "results" / "reward_service.json"
CLIENTS = 8  # enough for full batches: while four requests are scored, four wait


@dataclass(frozen=True)
class Scale:
    """How much is measured: the model's layers; rounds, batches in each, (clients, images a request); with two
    replicas the seconds before and after one is killed, and the load as a part of what one bare model can do."""

    tower: dict[str, int]
    rounds: int
    batches: int
    sweep: tuple[tuple[int, int], ...]
    settled_s: float
    broken_s: float
    load: float


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FULL = Scale({}, 5, 5, ((1, 4), (2, 4), (4, 4), (8, 4), (16, 4), (32, 4), (1, 16), (2, 16)), 20, 40, 0.5)
QUICK = Scale(TINY, 2, 2, ((1, 4), (4, 4)), 4, 25, 0.05)


class Watching:
    """A reward worker that keeps its batches."""

    def __init__(self, worker: RewardWorker) -> None:
        self.worker, self.batches, self.busy = worker, [], False

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        self.busy, started = True, time.perf_counter()
        try:
            return self.worker.score(images, prompts)
        finally:
            self.busy = False
            self.batches.append(Batch(len(images), started, time.perf_counter()))


class Watched(service.Scorer):
    """A replica that can be asked what it did."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batcher.worker = self.watching = Watching(self.batcher.worker)

    async def batches(self) -> list[Batch]:
        """Since the last call."""
        done, self.watching.batches = self.watching.batches, []
        return done

    async def pid_if_busy(self) -> int | None:
        return os.getpid() if self.watching.busy else None


@contextmanager
def serving(path: str, replicas: int) -> Iterator[tuple[str, DeploymentHandle]]:
    """A service of the model on a Ray of its own: its URL, and its replicas."""
    port = free_port()
    config = ServiceConfig(
        rewards={"clip": ClipScore.Config(path=path)},
        deployments={"clip": DeploymentConfig(min_replicas=replicas, batch=BATCH, cpus=0.5)},
        limits=Limits(concurrency=64),
        port=port,
    )
    scorer, service.Scorer = service.Scorer, Watched
    try:
        with cluster(ClusterConfig()), service.serving(config) as url:
            yield url, serve.get_app_handle(service.app_name("clip"))
    finally:
        service.Scorer = scorer


def start_pool(path: str) -> Pool:
    """A run's pool of one reward worker."""
    config = load(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
    config = config.model_copy(update={"rewards": {"clip": ClipScore.Config(path=path)}})
    plan = derive(config, os.cpu_count() or 1, 0)
    return Pool("reward", lambda *_: make_reward_worker(config, plan, plan.reward_pools[0], "DEFAULT"), 1, 120)


def in_job(pool: Pool, batches: int) -> tuple[float, np.ndarray]:
    """As `bare`, by the pool. Images go into the object store here; in a job their sampler does that."""
    started = time.perf_counter()
    for index in range(batches):
        images, prompts = piece(index, BATCH)
        pool.submit(index, "score", ray.put(images), prompts)
    values = {done.key: done.value.values["clip"] for done in stream(pool)}
    return time.perf_counter() - started, np.concatenate([values[index] for index in range(batches)])


def bench_clients(path: str, scale: Scale) -> dict[str, Any]:
    """The three ways in turns, who begins alternating, and then the service by number of clients."""
    with process() as model, process() as clients, serving(path, 1) as (url, replica):
        pool = start_pool(path)
        expected = model.submit(bare, path, IMAGES // BATCH).result()[1]

        def http(count: int, requests: int, size: int) -> dict[str, float]:
            replica.batches.remote().result()
            asked = clients.submit(in_turn, url, count, requests, size).result()
            if mistakes := wrong(asked, expected):
                raise RuntimeError(f"{len(mistakes)} of {requests} requests went wrong, the first: {mistakes[0]}")
            return figures(asked, size, replica.batches.remote().result())

        def alone(seconds: float, values: np.ndarray) -> dict[str, float]:
            np.testing.assert_allclose(values, np.resize(expected, len(values)), atol=1e-4)
            return {"images_per_s": len(values) / seconds}

        ways = {  # functions of the number of batches
            "bare": lambda batches: alone(*model.submit(bare, path, batches).result()),
            "in_job": lambda batches: alone(*in_job(pool, batches)),
            "http": lambda batches: http(CLIENTS, batches * BATCH // REQUEST, REQUEST),
            "forwards": lambda _: {"images_per_s": BATCH / model.submit(forwards, path).result()},
        }
        for way in ways.values():  # caches, lazy parts
            way(2)
        rounds = []
        for index in range(scale.rounds):
            order = list(ways) if index % 2 else list(ways)[::-1]
            rounds.append({name: ways[name](scale.batches) for name in order})
        sweep = [
            {"clients": count, "images": size, **http(count, max(16, 5 * count // 2) * REQUEST // size, size)}
            for count, size in scale.sweep
        ]
        packed = clients.submit(packing).result()
        pool.shutdown()
    return {"rounds": rounds, "ways": medians(rounds), "sweep": sweep, "packing": packed}


def bench_kill(path: str, scale: Scale) -> dict[str, Any]:
    """Single images at a steady rate to two replicas, of which one is killed."""
    with process() as model, process() as clients, serving(path, 2) as (url, replicas):
        model.submit(bare, path, 1).result()
        seconds, expected = model.submit(bare, path, IMAGES // BATCH).result()
        rate = scale.load * IMAGES / seconds
        clients.submit(in_turn, url, 4, 16, 1).result()  # caches, lazy parts
        asking = clients.submit(steadily, url, rate, scale.settled_s + scale.broken_s)
        time.sleep(scale.settled_s)
        while (pid := replicas.pid_if_busy.remote().result()) is None:
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        killed = time.perf_counter()
        times = {"noticed_s": _when(lambda running: running < 2) - killed}
        times["replaced_s"] = _when(lambda running: running == 2) - killed
        asked = asking.result()
    return {"rate": rate, **times, **disturbance(asked, killed, wrong(asked, expected))}


def _when(reached: Callable[[int], bool]) -> float:
    """The time at which the number of running replicas is as wanted."""
    deadline, app = time.monotonic() + 120, service.app_name("clip")
    while not reached(serve.status().applications[app].deployments["clip"].replica_states.get("RUNNING", 0)):
        if time.monotonic() > deadline:
            raise TimeoutError("the killed replica was not replaced within 120 s")
        time.sleep(0.1)
    return time.perf_counter()


def markdown(kept: dict[str, Any]) -> str:
    """The kept figures as tables."""
    lines = []
    if part := kept.get("clients"):
        lines += ["| scored by | images/s | of the bare model | target |", "|---|---|---|---|"]
        for way, name, target in (
            ("bare", "the bare model in a loop", ""),
            ("in_job", f"a job's pool of one worker, batches of {BATCH}", ">= 0.95"),
            ("http", f"a service, {CLIENTS} clients, {REQUEST} PNGs a request", ">= 0.8"),
        ):
            found = part["ways"][way]
            lines.append(f"| {name} | {found['images_per_s']:.2f} | {found['ratio']:.3f} | {target} |")
        lines += [
            "",
            "| clients | images a request | requests/s | images/s | p50 | p95 | batch fill | model busy |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in part["sweep"]:
            lines.append(
                f"| {row['clients']} | {row['images']} | {row['requests_per_s']:.2f} | {row['images_per_s']:.2f} "
                f"| {row['p50_ms']:.0f} ms | {row['p95_ms']:.0f} ms | {row['batch_fill']:.2f} | {row['busy']:.2f} |"
            )
        lines += ["", "| an image as | kB | written in | read in |", "|---|---|---|---|"]
        for encoding, cost in part["packing"].items():
            lines.append(f"| {encoding} | {cost['kb']:.0f} | {cost['write_ms']:.1f} ms | {cost['read_ms']:.1f} ms |")
    if part := kept.get("kill"):
        rows = (
            ("load, requests/s", f"{part['rate']:.1f}"),
            ("lost", f"{part['lost']} of {part['requests']}"),
            ("p50, p95 before", f"{part['normal_p50_ms']:.0f}, {part['normal_p95_ms']:.0f} ms"),
            ("p95 above twice that", f"{part['slow_s']:.1f} s{'' if part['recovered'] else ' and longer'}"),
            ("requests above twice that", f"{part['slow_requests']}, the slowest {part['slowest_ms']:.0f} ms"),
            ("noticed, replaced after", f"{part['noticed_s']:.1f}, {part['replaced_s']:.1f} s"),
        )
        lines += ["", "| one of two replicas killed | |", "|---|---|", *(f"| {name} | {cell} |" for name, cell in rows)]
    return "\n".join(lines).strip()


PARTS = {"clients": bench_clients, "kill": bench_kill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--part", choices=list(PARTS), help="measure this one only")
    parser.add_argument("--rounds", type=int, help=f"of the three ways in turns, {FULL.rounds} if not given")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few requests, nothing kept")
    args = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() and not args.quick else {}
    if args.command == "run":
        scale = QUICK if args.quick else FULL
        scale = replace(scale, rounds=args.rounds or scale.rounds)
        with tempfile.TemporaryDirectory() as path:
            checkpoint(path, scale.tower)
            for name in [args.part] if args.part else PARTS:
                print(f"{name} ...", file=sys.stderr, flush=True)
                kept[name] = {
                    "date": date.today().isoformat(),
                    "commit": commit(),
                    "machine": machine(),
                    "versions": {"python": platform.python_version(), **software()},
                    "load_before": os.getloadavg()[0],
                } | PARTS[name](path, scale)
        if not args.quick:
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(markdown(kept))


if __name__ == "__main__":
    main()
