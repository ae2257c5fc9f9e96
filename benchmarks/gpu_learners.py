"""Stages of gpu.py that train: updates of the real learner, a whole step, a weight sync, and whether SRPO fits."""

import tempfile
from pathlib import Path
from typing import Any

import gpu_networks as networks
import torch
from common import free_port
from gpu_bench import Bench
from gpu_plan import LEVELS, Variant, batches, case, learner_case, srpo_case

from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import StepWork
from align_cluster.learner.worker import Learner
from align_cluster.planner.fit import CONTEXT, GIB, SPARE
from align_cluster.rollouts.sampler import Sampler
from align_cluster.weights import check

THREADS = 4
SYNC_MB = 38  # a rank-32 LoRA of SD3.5-M in bf16, of which the goal speaks; adapters travel in fp32


def make_learner(config: RunConfig, device: str) -> Learner:
    """Build a learner of one rank, in this process."""
    port = free_port()
    return Learner(config.learner_setup, 0, 1, "127.0.0.1", port, THREADS, device)


def update(learner: Learner, work: StepWork) -> None:
    """Train, and fail where the learner has skipped the update."""
    metrics = learner.update(work)
    if metrics["skipped"].total:
        raise RuntimeError("the update was skipped: its loss or gradient is not finite")


def updates(bench: Bench, name: str, variants: list[Variant]) -> None:
    """Measure one case's updates, with other settings of the engine."""
    with tempfile.TemporaryDirectory() as folder, networks.random_weights(bench.device):
        for each in variants:
            config = learner_case(name, Path(folder), bench.tiny, each)
            bench.row(f"{name} update, {each}", lambda each=each, config=config: _update(bench, name, config, each))


def _update(bench: Bench, name: str, config: RunConfig, variant: Variant) -> dict[str, Any]:
    before, planned = bench.held(), bench.plan.get(name, {})
    learner = make_learner(config, bench.device)
    try:
        record = networks.made_up_record(learner, config, config.rollout.chunk, LEVELS)
        work = networks.learner_work(learner, config, [record])
        update(learner, work)  # makes the optimiser's moments
        peak = bench.peak(before)
        seconds = bench.seconds(lambda: update(learner, work))
        count = config.rollout.chunk * learner.algorithm.inner_passes(config.rollout.steps, len(record.slots))
    finally:
        networks.discard(learner.denoiser)
    tflop = planned.get("update_tflop", {}).get(variant.activations, 0)
    figures = {"value": 1000 * seconds / count, "unit": "ms a sample x timestep", "goal": ">= 35 % of peak", **peak()}
    if memory := planned.get("learner_gib", {}).get(str(variant)):
        figures["planned_gib"] = memory
    return figures | bench.share(count * tflop, seconds)


def whole_step(bench: Bench) -> None:
    """Take a step of DiffusionNFT with sampler and learner on the card, without Ray; and time a weight sync."""
    rows = 2 if bench.tiny else 16
    with tempfile.TemporaryDirectory() as folder, networks.random_weights(bench.device):
        config = case("sd35 nft", Path(folder), bench.tiny, *batches(rows), "learner.fold=1")
        sampler, learner = Sampler(config.backbone, THREADS, "gpu", bench.device), make_learner(config, bench.device)
        bench.row("sd35 sync", lambda: _sync(bench, sampler, learner))
        bench.row("sd35 nft, a whole step", lambda: _step(bench, config, sampler, learner, rows))
        networks.discard(sampler.denoiser)
        networks.discard(learner.denoiser)


def _sync(bench: Bench, sampler: Sampler, learner: Learner) -> dict[str, Any]:
    times: dict[str, list[float]] = {"publish": [], "adopt": []}
    for version in range(1, 7):
        published, receipts = [], []
        times["publish"].append(bench.time(lambda v=version, p=published: p.append(learner.publish("behaviour", v))))
        times["adopt"].append(bench.time(lambda p=published, r=receipts: r.append(sampler.adopt(*p[0]))))
        check(published[0][0], receipts, 1)
    publish, adopt = (1000 * sorted(values[1:])[2] for values in times.values())
    size = published[0][0].nbytes / 1e6
    note = f"{size:.1f} MB in fp32: publish {publish:.1f}, adopt {adopt:.1f}"
    return {"value": publish + adopt, "unit": "ms", "goal": f"< 50 for {SYNC_MB} MB", "note": note}


def _step(bench: Bench, config: RunConfig, sampler: Sampler, learner: Learner, rows: int) -> dict[str, Any]:
    planned, chunks, records = bench.plan.get("sd35 nft", {}), 2, []
    update(learner, networks.learner_work(learner, config, [networks.draw(sampler, config, rows)[1]]))  # warm
    drawing = bench.time(lambda: records.extend(networks.draw(sampler, config, rows)[1] for _ in range(chunks)))
    learning = bench.time(lambda: update(learner, networks.learner_work(learner, config, records)))
    version = sampler.version + 1
    syncing = bench.time(lambda: sampler.adopt(*learner.publish("behaviour", version)))
    seconds, images, steps = drawing + learning + syncing, chunks * rows, config.rollout.steps
    each = steps * planned.get("draw_tflop", 0) + planned.get("decode_tflop", 0)
    each += learner.algorithm.inner_passes(steps, 0) * planned.get("update_tflop", {}).get("plain", 0)
    note = f"{images} images: rollout {drawing:.2f} s, update {learning:.2f} s, sync {syncing:.3f} s"
    return {"value": images / seconds, "unit": "images/s", "note": note, **bench.share(images * each, seconds)}


def srpo(bench: Bench) -> None:
    """Find out whether SRPO at 720 px fits as the planner says, with sampler and learner on one card."""
    with (
        tempfile.TemporaryDirectory() as folder,
        networks.random_weights(bench.device),
        networks.random_hps(bench.device),
    ):
        config = srpo_case(Path(folder), bench.tiny)
        bench.row("flux srpo, 720 px, sampler and learner", lambda: _srpo(bench, config))


def _srpo(bench: Bench, config: RunConfig) -> dict[str, Any]:
    before, planned = bench.held(), bench.plan.get("flux srpo")
    peak = bench.peak(before)
    sampler, learner = Sampler(config.backbone, THREADS, "gpu", bench.device), make_learner(config, bench.device)
    try:
        record = networks.draw(sampler, config, config.rollout.chunk)[1]
        work = networks.learner_work(learner, config, [record, record])
        update(learner, work)
        seconds = bench.time(lambda: update(learner, work)) / 2
    finally:
        networks.discard(sampler.denoiser)
        networks.discard(learner.denoiser)
    figures = {"value": seconds, "unit": "s an image's update", **peak()}
    if planned and bench.device == "cuda":
        memory = planned["sampler_gib"][str(config.rollout.chunk)] + planned["learner_gib"][str(Variant(True))]
        need, room = memory + 2 * CONTEXT / GIB, torch.cuda.get_device_properties(0).total_memory / GIB
        fits = "fits" if need <= (1 - SPARE) * room else "does not fit"
        figures |= {"planned_gib": memory, "note": f"plan: {need:.1f} GiB with CUDA's own {fits} into {room:.1f}"}
    return figures
