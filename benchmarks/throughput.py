"""What does the system cost beside the arithmetic that nobody can avoid? Six questions, one machine, one run.

    python benchmarks/throughput.py            # minutes, on an otherwise idle machine
    python benchmarks/throughput.py --quick    # a check that it works; its figures mean little

run      images/s of a short run of configs/quickstart.yaml, and the driver's own work per group
rollout  Sampler.draw against bare forwards of the same network, and against the best plain torch loop
learner  Learner.update against a bare torch loop with the same passes and AdamW step, in the same and in larger batches
single   a step with one image a prompt against one with full groups: rollout and update
driver   the driver's work per chunk for 12 to 3,072 chunks a step, whose drawing takes no time
sync     a LoRA from publishing to the last receipt, by size and number of samplers

"Bare" is the same arithmetic in plain torch: like for like in our batches, and best: the LoRA merged, large batches,
PyTorch's own attention, with `--compile` also compiled (which takes minutes).
Compared things are timed in turns in one process, and the medians of the ratios are kept. Results go to
benchmarks/results/throughput.json, the table to stdout as Markdown.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from common import commit, free_port, machine

from align_cluster.backbones.adapters import active_adapter, adapter_parameters, add_adapters
from align_cluster.cluster.actors import RemoteSampler
from align_cluster.cluster.nodes import software
from align_cluster.config.load import load
from align_cluster.config.plan import ROWS, inner_passes, settle
from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import StepWork, TrainingChunk, make_micro_batches, rank_work
from align_cluster.learner.worker import Learner
from align_cluster.loop.requests import training_request
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.groups import plan_step
from align_cluster.rollouts.sampler import DrawRequest, Sampler, fingerprint, keys_of
from align_cluster.types import Chunk, Condition, DrawInfo, Receipt
from align_cluster.weights import adopt, check, publish

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "throughput.json"
CONFIGS = {"nft": "quickstart.yaml", "grpo": "embedded_grpo.yaml"}
FILES = CONFIGS | {"srpo": "embedded_srpo.yaml", "critic": "embedded_critic.yaml"}
SD35_SHAPES = [(32, 1536), (1536, 32)] * 132  # 52 MB of fp32: about a rank-32 LoRA of SD3.5-Medium


def config_of(kind: str, *overrides: str) -> RunConfig:
    return settle(load(ROOT / "configs" / FILES[kind], list(overrides)), os.cpu_count() or 1, 0)


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


def drawn(config: RunConfig, groups: int, size: int) -> tuple[Sampler, DrawRequest, list[Chunk], dict[str, Condition]]:
    """A sampler, a training request, and `groups` groups of `size` images in the run's chunks, with conditions."""
    sampler = Sampler(config.backbone, config.cluster.threads, merge=config.rollout.merge_lora)
    sampler.adopt(*publish(noise_in(sampler), 1))
    prompts = PROMPTS[config.prompts.kind](config.prompts).load()
    chunks = plan_step(prompts, 0, 0, groups, size, config.rollout.chunk)
    texts = list(dict.fromkeys(text for chunk in chunks for text in chunk.texts))
    conditions = dict(zip(texts, sampler.encode(texts), strict=True))
    return sampler, training_request(config, 0, 1), chunks, conditions


def noise_in(sampler: Sampler) -> dict[str, np.ndarray]:
    """A LoRA of small random numbers, as training makes one."""
    rng, own = np.random.default_rng(0), adapter_parameters(sampler.denoiser, "default")
    return {name: 0.01 * rng.standard_normal(tuple(value.shape), dtype=np.float32) for name, value in own.items()}


def stock_network(backbone: Any, compiled: bool) -> torch.nn.Module:
    """The base network as diffusers loads it, which costs what one with a merged LoRA does."""
    network = backbone.stock(backbone.network).from_pretrained(backbone.source, subfolder=backbone.part)
    network = network.eval().requires_grad_(False)
    return torch.compile(network) if compiled else network


def texts_of(chunk: Chunk, conditions: dict[str, Condition]) -> tuple[torch.Tensor, torch.Tensor]:
    own = [conditions[prompt.text] for prompt in chunk.prompts]
    return tuple(torch.stack([torch.tensor(getattr(one, part)) for one in own]) for part in ("sequence", "pooled"))


def bench_rollout(rounds: int, compiled: bool) -> dict[str, dict[str, float]]:
    """Each algorithm's rollout of one chunk, in the config's precision and in the other one."""
    pairs = (("nft", "bf16"), ("grpo", "bf16"), ("nft", "fp32"))
    return {f"{kind} {precision}": _rollout(kind, precision, rounds, compiled) for kind, precision in pairs}


def _rollout(kind: str, precision: str, rounds: int, compiled: bool) -> dict[str, float]:
    config = config_of(kind, f"backbone.precision={precision}")
    size = config.rollout.group_size
    sampler, request, (chunk, *_), conditions = drawn(config, config.prompts_per_step, size)
    backbone = sampler.backbone

    def ours() -> None:
        sampler.draw(chunk, conditions, None, request)

    def forwards(network: torch.nn.Module, rows: int) -> None:
        """As many images as `ours`, in batches of `rows`."""
        sequence, pooled = (part[:rows] for part in texts)
        with torch.no_grad():
            for _ in range(len(chunk) // rows):
                for _ in range(request.steps):
                    backbone.velocity(network, x[:rows], sigma[:rows], sequence, pooled)
                backbone.decode(x[:rows])

    texts = texts_of(chunk, conditions)
    x, sigma = torch.randn(len(chunk), *backbone.latent_shape), torch.full((len(chunk),), 0.5)
    result = in_turns(ours, lambda: forwards(sampler.denoiser, len(chunk)), rounds)
    best = stock_network(backbone, compiled)
    result["best_ratio"] = in_turns(ours, lambda: forwards(best, len(chunk)), rounds)["ratio"]
    result["group_ratio"] = in_turns(ours, lambda: forwards(best, size), rounds)["ratio"]
    return result | {"images_per_s": len(chunk) / result["ours_s"], "rows": len(chunk)}


def learner_of(config: RunConfig) -> Learner:
    port = free_port()
    return Learner(config.learner_setup, 0, 1, "127.0.0.1", port, config.cluster.threads)


def work_of(config: RunConfig, records: list[Any], conditions: dict[str, Condition]) -> StepWork:
    """All records of a step as one optimiser update of one rank."""
    advantages = [np.linspace(-1, 1, len(record.chunk), dtype=np.float32) for record in records]
    whole = [0, sum(map(len, advantages))]
    valid = [np.ones(len(own), bool) for own in advantages]
    micro_batches = make_micro_batches(advantages, valid, bounds=whole, size=config.learner.micro_batch)
    return rank_work(0, micro_batches, [TrainingChunk(record, conditions) for record in records])


def bench_learner(rounds: int) -> dict[str, dict[str, float]]:
    """One update of the images that a rank has in one, by DeepSpeed engine and by plain torch."""
    return {kind: _learner(kind, rounds) for kind in CONFIGS}


def _learner(kind: str, rounds: int) -> dict[str, float]:
    config = config_of(kind, "steps=100000")
    groups = config.prompts_per_step // config.learner.updates_per_step
    sampler, request, chunks, conditions = drawn(config, groups, config.rollout.group_size)
    records = [sampler.draw(chunk, conditions, None, request)[2] for chunk in chunks]
    learner, work = learner_of(config), work_of(config, records, conditions)
    backbone, algorithm = learner.backbone, learner.algorithm
    passes = inner_passes(config)
    frozen = (["old"] if "old" in algorithm.adapters else []) + ([None] if config.algorithm.kl_beta else [])
    texts = [torch.cat(parts) for parts in zip(*(texts_of(chunk, conditions) for chunk in chunks), strict=True)]
    x0 = torch.cat([torch.tensor(record.x0) for record in records])

    def loop(network: torch.nn.Module, rows: int, fold: int) -> Callable[[], None]:
        """The same passes in batches of `rows` images at `fold` noise levels."""
        network = add_adapters(backbone, network, algorithm.adapters)
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, config.optimizer.lr)

        def bare() -> None:
            for first in range(0, passes, fold):
                times = min(fold, passes - first)
                for start in range(0, len(x0), rows):
                    x, *text = (
                        part[start : start + rows].repeat(times, *[1] * (part.ndim - 1)) for part in (x0, *texts)
                    )
                    sigma, targets = torch.full((len(x),), 0.5), [x]
                    for name in frozen:
                        with torch.no_grad(), active_adapter(network, name):
                            targets.append(backbone.velocity(network, x, sigma, *text))
                    v = backbone.velocity(network, x, sigma, *text)
                    sum(((v - target) ** 2).mean() for target in targets).backward()
            torch.nn.utils.clip_grad_norm_(trainable, config.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

        return bare

    like = loop(backbone.load_denoiser(), config.learner.micro_batch, config.learner.fold)
    best = loop(stock_network(backbone, False), ROWS, max(1, ROWS // len(x0)))
    result = in_turns(lambda: learner.update(work), like, rounds)
    result["best_ratio"] = in_turns(lambda: learner.update(work), best, rounds)["ratio"]
    return result | {"samples_x_timesteps_per_s": passes * len(x0) / result["ours_s"]}


def bench_single(rounds: int) -> dict[str, dict[str, float]]:
    """How much longer a step of rollout and update takes with one image a prompt than with groups."""
    return {kind: _single(kind, rounds) for kind in ("srpo", "critic")}


def _single(kind: str, rounds: int) -> dict[str, float]:
    steps = []
    for groups, size in ((24, 1), (2, 12)):
        shape = (f"prompts_per_step={groups}", f"rollout.group_size={size}", "learner.updates_per_step=1")
        config = config_of(kind, *shape, "steps=100000")
        sampler, request, chunks, conditions = drawn(config, groups, size)
        learner = learner_of(config)

        def step(
            config: RunConfig = config, sampler: Sampler = sampler, learner: Learner = learner,
            chunks: list[Chunk] = chunks, conditions: dict[str, Condition] = conditions, request: Any = request,
        ) -> None:  # fmt: skip
            records = [sampler.draw(chunk, conditions, None, request)[2] for chunk in chunks]
            work, targets = work_of(config, records, conditions), {}
            if learner.critic:
                values = np.concatenate(learner.values(work.chunks)[0])
                targets = {name: values[: len(work.micro_batches[0].weights)] for name in ("returns", "values")}
                targets["advantages"] = targets["values"][..., 0]
            parts = [
                replace(part, **{name: column[: len(part.weights)] for name, column in targets.items()})
                for part in work.micro_batches
            ]
            learner.update(replace(work, micro_batches=parts))

        steps.append(step)
    found = in_turns(*steps, rounds)
    return {"single_s": found["ours_s"], "groups_s": found["bare_s"], "ratio": 1 / found["ratio"]}


class Blank(RemoteSampler):
    """A sampler that draws black images of 8 x 8 pixels at once."""

    def draw(
        self, chunk: Chunk, conditions: Any, null: Any, request: DrawRequest, perturbations: Any = MappingProxyType({})
    ) -> tuple[DrawInfo, np.ndarray, None]:
        asked = fingerprint(chunk, request, keys_of(conditions), keys_of(perturbations))
        return DrawInfo(chunk, request.version, asked, 0.0), np.zeros((len(chunk), 8, 8, 3), np.uint8), None


def bench_driver(rounds: int) -> dict[str, float]:
    """The driver's milliseconds of processor time a chunk, by chunks a step, where samplers and rewards do nothing."""
    import ray

    from align_cluster.cluster.placement import cluster
    from align_cluster.cluster.pool import Pool
    from align_cluster.config.plan import RewardPool
    from align_cluster.loop.conditions import ConditionStore
    from align_cluster.loop.rollouts import RolloutCollector
    from align_cluster.loop.syncing import WeightSync
    from align_cluster.rewards.worker import RewardWorker

    config = config_of("nft", "rewards={jpeg: {kind: jpeg}}", "rollout.chunk=1")
    prompts, found = PROMPTS[config.prompts.kind](config.prompts).load()[:12], {}
    with cluster(config.cluster):
        blank, judge = (ray.remote(kind).options(num_cpus=0) for kind in (Blank, RewardWorker))
        samplers = Pool("sampler", lambda name, _: blank.remote(config.backbone, 1, name), 2, timeout_s=120)
        rewards = Pool("reward jpeg", lambda *_: judge.remote(dict(config.rewards)), 1, timeout_s=120)
        pools = [(rewards, RewardPool("jpeg", ("jpeg",), workers=1, most=1, cpus=0.0, batch=48))]
        conditions = ConditionStore(config, samplers)
        weights = WeightSync(120, samplers, None, 0)  # the base model's: nothing is published
        collector = RolloutCollector(config, samplers, pools, conditions, weights, lambda *_: None)
        conditions.encode(prompts)
        request = training_request(config, 0, 0)
        for count in (12, 768, 3072):
            chunks, times = plan_step(prompts, 0, 0, count, 1, 1), []
            for _ in range(min(rounds, 3) + 1):
                started = time.process_time()
                collector.draw(chunks, request)
                times.append(1000 * (time.process_time() - started) / count)
            found[f"{count}"] = statistics.median(times[1:])
        for pool in (samplers, rewards):
            pool.shutdown()
    return found


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
        figure = f"{row['ratio']:.2f} ({row['rows']} rows, {row['images_per_s']:.1f} images/s)"
        rows.append((f"the same forwards and decoding / rollout, {label}", figure, ">= 0.90"))
        figure = f"{row['best_ratio']:.2f}; in batches of one group {row['group_ratio']:.2f}"
        rows.append((f"best bare loop / rollout, {label}", figure, ">= 0.90"))
    for label, row in kept.get("learner", {}).items():
        figure = f"{row['ratio']:.2f} ({1000 * row['ours_s']:.0f} ms)"
        rows.append((f"the same passes in torch / learner update, {label}", figure, ">= 0.90"))
        rows.append((f"best bare loop / learner update, {label}", f"{row['best_ratio']:.2f}", ">= 0.90"))
    for label, row in kept.get("single", {}).items():
        rows.append((f"one image a prompt / full groups, {label}", f"{row['ratio']:.2f}", "<= 1.15"))
    if driver := kept.get("driver"):
        figure = ", ".join(f"{count}: {ms:.2f}" for count, ms in driver.items())
        rows.append(("driver, ms a chunk by chunks a step", figure, "flat"))
    for label, row in kept.get("sync", {}).items():
        figure = f"{row['total_ms']:.1f} ms (publish {row['publish_ms']:.1f}, adopt {row['adopt_ms']:.1f})"
        rows.append((f"LoRA, {label}", figure, "< 150 ms" if label == "52 MB to 4" else ""))
    return "\n".join(["| what | measured | target |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, nothing kept")
    parser.add_argument(
        "--only", choices=["run", "rollout", "learner", "single", "driver", "sync"], help="one part, nothing kept"
    )
    parser.add_argument("--compile", action="store_true", help="compile the best bare rollout, which takes minutes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, Any] = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **software()},
        "load_before": os.getloadavg()[0],
    }
    rounds = 3 if args.quick else 11
    parts = {
        "rollout": lambda: bench_rollout(rounds, args.compile),
        "learner": lambda: bench_learner(rounds),
        "single": lambda: bench_single(rounds),
        "driver": lambda: bench_driver(rounds),
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
