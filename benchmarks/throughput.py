"""What does the system cost beside the arithmetic that nobody can avoid? Five questions, one machine, one run.

    python benchmarks/throughput.py            # minutes, on an otherwise idle machine
    python benchmarks/throughput.py --quick    # a check that it works; its figures mean little

run      images/s of a short run of configs/quickstart.yaml, and the driver's own work per group
rollout  Sampler.draw against the bare forwards of the same network, and the decoding
learner  Learner.update against a bare torch loop with the same forwards, backwards and AdamW step
sync     a LoRA from publishing to the last receipt, by size and number of samplers

Compared things are timed in turns in one process, and the medians of the ratios are kept. Results go to
benchmarks/results/throughput.json, the table to stdout as Markdown.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alignment import commit

from align_cluster.cluster.nodes import software
from align_cluster.config.load import load
from align_cluster.config.run import RunConfig
from align_cluster.learner.worker import Learner
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.types import Chunk, Condition, Prompt, Receipt, Row
from align_cluster.weights import adopt, check, publish

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "throughput.json"
PROMPTS = ("a photo of a red circle", "a photo of a blue square above a green star")
CONFIGS = {"nft": "quickstart.yaml", "grpo": "embedded_grpo.yaml"}
SD35_SHAPES = [(32, 1536), (1536, 32)] * 132  # 52 MB of fp32: about a rank-32 LoRA of SD3.5-Medium


def config_of(kind: str, *overrides: str) -> RunConfig:
    return load(ROOT / "configs" / CONFIGS[kind], list(overrides))


def in_turns(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median seconds of both, and the median over rounds of second / first; who begins alternates."""
    seconds: dict[Callable, list[float]] = {first: [], second: []}
    first(), second()  # caches, allocator, lazy parts
    for index in range(rounds):
        for work in (first, second) if index % 2 else (second, first):
            started = time.perf_counter()
            work()
            seconds[work].append(time.perf_counter() - started)
    ratios = [bare / ours for ours, bare in zip(seconds[first], seconds[second], strict=True)]
    return {
        "ours_s": statistics.median(seconds[first]),
        "bare_s": statistics.median(seconds[second]),
        "ratio": statistics.median(ratios),
    }


def drawn(config: RunConfig) -> tuple[Sampler, DrawRequest, list[Chunk], dict[str, Condition]]:
    """A sampler, a training request of the algorithm, and two chunks of one prompt each, with the texts' conditions."""
    sampler = Sampler(config.backbone, config.cluster.threads)
    steps, size = config.rollout.steps, config.rollout.group_size
    window = config.window.plan(steps, 0, 0) if config.window else None
    request = DrawRequest(0, steps, config.step_kind, guidance=config.rollout.guidance, window=window)
    chunks = [
        Chunk(0, g, tuple(Row(Prompt(g, text), g, m, g * size + m, g * size + m) for m in range(size)))
        for g, text in enumerate(PROMPTS)
    ]
    return sampler, request, chunks, dict(zip(PROMPTS, sampler.encode(list(PROMPTS)), strict=True))


def bench_rollout(rounds: int) -> dict[str, dict[str, float]]:
    """Each algorithm's rollout of one chunk, in the config's precision and in the other one."""
    pairs = (("nft", "bf16"), ("grpo", "bf16"), ("nft", "fp32"))
    return {f"{kind} {precision}": _rollout(kind, precision, rounds) for kind, precision in pairs}


def _rollout(kind: str, precision: str, rounds: int) -> dict[str, float]:
    """`base_ratio` compares with forwards of the network without the LoRA, which is no rollout of a policy."""
    config = config_of(kind, f"backbone.precision={precision}")
    sampler, request, chunks, conditions = drawn(config)
    backbone, size = sampler.backbone, config.rollout.group_size
    sequence = torch.tensor(conditions[PROMPTS[0]].sequence).expand(size, -1, -1)
    pooled = torch.tensor(conditions[PROMPTS[0]].pooled).expand(size, -1)
    x, sigma = torch.randn(size, *backbone.latent_shape), torch.full((size,), 0.5)

    def ours() -> None:
        sampler.draw(chunks[0], conditions, None, request)

    def forwards(network: torch.nn.Module) -> None:
        with torch.no_grad():
            for _ in range(request.steps):
                backbone.velocity(network, x, sigma, sequence, pooled)
            backbone.decode(x)

    result = in_turns(ours, lambda: forwards(sampler.denoiser), rounds)
    base = backbone.load_denoiser()
    result["base_ratio"] = in_turns(ours, lambda: forwards(base), rounds)["ratio"]
    return result | {"images_per_s": size / result["ours_s"]}


def bench_learner(rounds: int) -> dict[str, dict[str, float]]:
    """One update over two groups, by DeepSpeed engine and by plain torch, in the config's precision."""
    return {kind: _learner(kind, rounds) for kind in CONFIGS}


def _learner(kind: str, rounds: int) -> dict[str, float]:
    from align_cluster.backbones.adapters import active_adapter, add_adapters
    from align_cluster.learner.batching import TrainingChunk, make_micro_batches, rank_work

    config = config_of(kind, "learner.updates_per_step=1", "steps=100000")
    sampler, request, chunks, conditions = drawn(config)
    records = [sampler.draw(chunk, conditions, None, request)[2] for chunk in chunks]
    size, threads = config.rollout.group_size, config.cluster.threads
    advantages = [np.linspace(-1, 1, size, dtype=np.float32)] * len(chunks)
    valid = [np.ones(size, bool)] * len(chunks)
    micro_batches = make_micro_batches(advantages, valid, bounds=[0, size * len(chunks)], size=size)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    learner = Learner(config.learner_setup, 0, 1, "127.0.0.1", port, threads)
    pairs = [TrainingChunk(record, conditions) for record in records]
    work = rank_work(0, micro_batches, pairs)

    backbone, algorithm = learner.backbone, learner.algorithm
    network = add_adapters(backbone, backbone.load_denoiser(), algorithm.adapters)
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, config.optimizer.lr)
    inner_passes = algorithm.inner_passes(config.rollout.steps, records[0].indices.shape[1])
    frozen = (["old"] if "old" in algorithm.adapters else []) + ([None] if config.algorithm.kl_beta else [])

    def bare() -> None:
        for _ in range(inner_passes):
            for record, condition in zip(records, conditions.values(), strict=True):
                x, sigma = torch.from_numpy(record.x0), torch.full((size,), 0.5)
                sequence = torch.from_numpy(condition.sequence).expand(size, -1, -1)
                pooled = torch.from_numpy(condition.pooled).expand(size, -1)
                targets = [x]
                for name in frozen:
                    with torch.no_grad(), active_adapter(network, name):
                        targets.append(backbone.velocity(network, x, sigma, sequence, pooled))
                v = backbone.velocity(network, x, sigma, sequence, pooled)
                sum(((v - target) ** 2).mean() for target in targets).backward()
        torch.nn.utils.clip_grad_norm_(trainable, config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    result = in_turns(lambda: learner.update(work), bare, rounds)
    passes = inner_passes * len(chunks) * size
    return result | {"samples_x_timesteps_per_s": passes / result["ours_s"]}


class Receiver:
    """A sampler's side of a weight sync, with parameters of any shapes."""

    def __init__(self, name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        torch.set_num_threads(1)
        self.name = name
        self.parameters = {key: torch.nn.Parameter(torch.zeros(shape)) for key, shape in shapes.items()}

    def adopt(self, manifest: Any, buffer: np.ndarray) -> Receipt:
        started = time.perf_counter()
        checksum = adopt(manifest, buffer, self.parameters)
        return Receipt(self.name, manifest.version, len(self.parameters), checksum, time.perf_counter() - started)


class Publisher:
    """A learner's side."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        rng = np.random.default_rng(0)
        self.state = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}

    def publish(self, version: int) -> tuple[Any, np.ndarray]:
        return publish(self.state, version)


def bench_sync(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of publishing (layout and checksum in the learner's process, into the object store) and adopting."""
    import ray

    from align_cluster.backbones.adapters import adapter_parameters
    from align_cluster.cluster.placement import cluster
    from align_cluster.cluster.pool import Pool

    backbone = config_of("nft").backbone
    embedded = [tuple(p.shape) for p in adapter_parameters(Sampler(backbone).denoiser, "default").values()]
    results = {}
    with cluster(config_of("nft").cluster):
        for label, shapes in (("52 MB", SD35_SHAPES), ("embedded", embedded)):
            named = {f"{index:04d}": shape for index, shape in enumerate(shapes)}
            publisher = ray.remote(Publisher).options(num_cpus=0).remote(named)
            receiver = ray.remote(Receiver).options(num_cpus=0)
            for count in (1, 2, 4):
                pool = Pool("sampler", lambda name, _, r=receiver, n=named: r.remote(name, n), count, timeout_s=120)
                pool.wait_until(lambda p=pool: len(p.ready_workers) == p.size)
                times = []
                for version in range(rounds + 2):
                    started = time.perf_counter()
                    manifest, buffer = publisher.publish.options(num_returns=2).remote(version)
                    manifest = ray.get(manifest)
                    published = time.perf_counter()
                    receipts = pool.broadcast("adopt", manifest, buffer)
                    check(manifest, receipts, count)
                    ended = time.perf_counter()
                    times.append((published - started, ended - published, max(r.seconds for r in receipts)))
                pool.shutdown()
                publishing, adopting, slowest = (1000 * statistics.median(t) for t in zip(*times[2:], strict=True))
                results[f"{label} to {count}"] = {
                    "bytes": manifest.nbytes,
                    "publish_ms": publishing,
                    "adopt_ms": adopting,
                    "slowest_sampler_ms": slowest,
                    "total_ms": publishing + adopting,
                }
            ray.kill(publisher)
    return results


def bench_run(steps: int) -> dict[str, Any]:
    """A short quickstart. What the driver does besides waiting is its processor time from step to step."""
    from align_cluster.loop import driver

    marks = []

    class Marking(driver.MetricWriter):
        def write(self, step: int, values: dict[str, float]) -> None:
            super().write(step, values)
            marks.append((time.thread_time(), time.process_time()))

    config = config_of("nft", f"steps={steps}", "evaluate.count=12", "evaluate.every=0", "evaluate.grid_every=0")
    writer, driver.MetricWriter = driver.MetricWriter, Marking
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = driver.train(config, Path(folder))
            summary = json.loads((path / "summary.json").read_text())
            rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    finally:
        driver.MetricWriter = writer
    groups = (steps - 1) * config.prompts_per_step
    thread, process = (1000 * (last - first) / groups for first, last in zip(marks[0], marks[-1], strict=True))
    stages = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0] if name.startswith("time/")}
    return {
        "images_per_s_of_a_step": statistics.median(row["throughput/images_per_s"] for row in rows[1:]),
        "images_per_s_with_start_and_evaluation": summary["images_per_s"],
        "stages_s": stages,
        "images_per_step": config.prompts_per_step * config.rollout.group_size,
        "driver_ms_per_group": thread,
        "driver_process_ms_per_group": process,
    }


def markdown(kept: dict[str, Any]) -> str:
    """The figures as one table."""
    rows = []
    if run := kept.get("run"):
        rows.append(("quickstart, a training step", f"{run['images_per_s_of_a_step']:.1f} images/s", ""))
        stages = ", ".join(f"{name.removeprefix('time/')} {1000 * s:.0f}" for name, s in run["stages_s"].items())
        rows.append(("its stages, ms", stages, ""))
        rows.append(("driver, ms a group", f"{run['driver_ms_per_group']:.2f}", "< 5"))
    for label, row in kept.get("rollout", {}).items():
        figure = f"{row['ratio']:.3f} ({1000 * row['ours_s']:.0f} ms; without LoRA {row['base_ratio']:.2f})"
        rows.append((f"bare forwards and decoding / rollout, {label}", figure, ">= 0.85"))
    for label, row in kept.get("learner", {}).items():
        figure = f"{row['ratio']:.3f} ({1000 * row['ours_s']:.0f} ms)"
        rows.append((f"bare torch step / learner update, {label}", figure, ">= 0.85"))
    for label, row in kept.get("sync", {}).items():
        figure = f"{row['total_ms']:.1f} ms (publish {row['publish_ms']:.1f}, adopt {row['adopt_ms']:.1f})"
        rows.append((f"LoRA, {label}", figure, "< 150 ms" if label == "52 MB to 4" else ""))
    return "\n".join(["| what | measured | target |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, nothing kept")
    parser.add_argument("--only", choices=["run", "rollout", "learner", "sync"], help="one part, nothing kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, Any] = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {"python": platform.python_version(), **software()},
        "load_before": os.getloadavg()[0],
    }
    rounds = 3 if args.quick else 21
    parts = {
        "rollout": lambda: bench_rollout(rounds),
        "learner": lambda: bench_learner(rounds),
        "sync": lambda: bench_sync(rounds),
        "run": lambda: bench_run(3 if args.quick else 12),
    }
    for name, part in parts.items():
        if args.only in (None, name):
            print(f"{name} ...", file=sys.stderr, flush=True)
            kept[name] = part()
    if not (args.quick or args.only):
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(markdown(kept))


if __name__ == "__main__":
    main()
