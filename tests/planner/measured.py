"""One rank of a real learner, and a real sampler, that say how many bytes they held: started by test_memory.py.

measured.py RANK WORLD PORT OUT DEVICE RUN...   each RUN is a config's JSON; rank 0 writes what each held to OUT.

On a CPU the profiler reports every allocation and release of PyTorch's allocator: the most bytes at once in a second
step, on top of the storages that were there when it began. On a GPU the allocator itself keeps count.
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import TrainingChunk, make_micro_batches, rank_work
from align_cluster.learner.worker import Learner
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.types import Chunk, Condition, Prompt, Record, Row


def storages() -> int:
    """Bytes of all tensors on the CPU that anything refers to."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type == "cpu"]
    return sum({storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())


def most(run: Callable[[], object], device: str) -> int:
    """The most bytes that the process held while a call ran."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    now = top = storages()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return top


def condition(key: str, shape: tuple[int, int, int]) -> Condition:
    tokens, width, pooled = shape
    rng = np.random.default_rng(0)
    return Condition(key, *(rng.standard_normal(size, dtype=np.float32) for size in ((tokens, width), pooled)))


def chunk_of(number: int, size: int) -> Chunk:
    """A chunk of the images of one prompt."""
    seeds = range(size * number, size * (number + 1))
    return Chunk(0, number, tuple(Row(Prompt(number, "p"), number, m, seed, seed) for m, seed in enumerate(seeds)))


def learner(config: RunConfig, rank: int, world: int, port: int, device: str) -> int:
    before = storages()
    made = Learner(config.learner_setup, rank, world, "127.0.0.1", port, device=device)
    shape, size, steps = made.backbone.latent_shape, config.rollout.group_size, config.rollout.steps
    rng = np.random.default_rng(0)
    chunks = [chunk_of(g, size) for g in range(2 * world)]
    noise = rng.standard_normal((size, *shape), dtype=np.float32)
    path = {"indices": np.empty((size, 0), np.int64)}
    if made.algorithm.needs_density:
        states = np.repeat(noise[:, None], steps, 1)
        path = {"indices": np.tile(np.arange(steps), (size, 1)), "before": states, "after": states}
        path["log_probs"] = np.zeros((size, steps), np.float32)
    records = [Record(chunk, 0, noise, np.linspace(1, 0, steps + 1), **path) for chunk in chunks]
    text, null = (condition(key, made.backbone.text_shape) for key in ("text", "null"))
    each, targets = (size,), None
    if made.algorithm.critic:
        each = (size, steps)
        targets = {name: [np.zeros((*each, 1), np.float32)] * len(chunks) for name in ("returns", "values")}
    advantages = [rng.standard_normal(each).astype(np.float32) for _ in chunks]
    valid = [np.ones(size, bool)] * len(chunks)
    micro_batches = make_micro_batches(
        advantages, valid, bounds=[0, size * len(chunks)], size=config.learner.micro_batch, targets=targets
    )
    pairs = [TrainingChunk(record, {"p": text}) for record in records]
    null = null if config.rollout.guidance > 1 else None
    work = rank_work(0, micro_batches, pairs, rank=rank, world=world, null=null)

    def update() -> None:
        made.update(work)

    update()  # makes the optimiser's moments
    return most(update, device) - (before if device == "cpu" else 0)


def sampler(config: RunConfig, device: str) -> int:
    before = storages()
    made = Sampler(config.backbone, device=device)
    text = condition("text", made.backbone.text_shape)
    null = condition("null", made.backbone.text_shape) if config.rollout.guidance > 1 else None
    chunk = chunk_of(0, config.rollout.group_size)
    request = DrawRequest(0, config.rollout.steps, config.step_kind, guidance=config.rollout.guidance)

    def draw() -> None:
        made.draw(chunk, {"p": text}, null, request)

    draw()  # loads the network and the VAE
    return most(draw, device) - (before if device == "cpu" else 0)


def main() -> None:
    torch.set_num_threads(1)
    rank, world, port = (int(value) for value in sys.argv[1:4])
    out, device = Path(sys.argv[4]), sys.argv[5]
    held = []
    for text in sys.argv[6:]:
        config = RunConfig.model_validate_json(text)
        held.append({"learner": learner(config, rank, world, port, device)})
        if world == 1:
            held[-1]["sampler"] = sampler(config, device)
    if rank == 0:
        out.write_text(json.dumps(held))


if __name__ == "__main__":
    main()
