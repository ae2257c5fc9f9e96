"""What does SLAS's worst-case bound on gamma cost? Processor time of its estimates against that of training.

    python benchmarks/trust_region.py

One rank, one thread, configs/embedded_slas.yaml: an update of four groups with their rollouts, the Fisher matrix
measured at every tenth update (`advantage.shaping.refresh`). Prints the share of the whole.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import free_port

from align_cluster.config.load import load
from align_cluster.learner.batching import TrainingChunk, make_micro_batches, rank_work
from align_cluster.learner.worker import Learner
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.types import Chunk, Prompt, Row

ADAPTIVE = ("advantage.shaping.gamma=adaptive", "advantage.shaping.bound=worst_case")
UPDATES, GROUPS = 31, 4
TEXTS = ("a red circle", "a blue square", "a green star", "a yellow triangle")


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    file = Path(__file__).parents[1] / "configs" / "embedded_slas.yaml"
    config = load(file, [*ADAPTIVE, "learner.updates_per_step=1", "steps=100000"])
    sampler, size, steps = Sampler(config.backbone), config.rollout.group_size, config.rollout.steps
    texts = [f"a photo of {text}" for text in TEXTS]
    conditions = dict(zip(texts, sampler.encode(texts), strict=True))
    chunks = [
        Chunk(0, g, tuple(Row(Prompt(g, text), g, m, g * size + m, g * size + m) for m in range(size)))
        for g, text in enumerate(texts)
    ]
    request = DrawRequest(
        0, steps, config.step_kind, window=config.window.plan(steps, 0, 0), schedule=config.rollout.schedule
    )
    records = []

    def draw() -> None:
        records[:] = [sampler.draw(chunk, conditions, None, request)[2] for chunk in chunks]

    drawing = statistics.median(seconds(draw) for _ in range(5))
    port = free_port()
    learner = Learner(config.learner_setup, 0, 1, "127.0.0.1", port)
    advantages = [np.linspace(-1, 1, size, dtype=np.float32)] * GROUPS
    valid = [np.ones(size, bool)] * GROUPS
    micro_batches = make_micro_batches(advantages, valid, bounds=[0, size * GROUPS], size=size)
    pairs = [TrainingChunk(record, conditions) for record in records]
    work = rank_work(0, micro_batches, pairs)
    learner.update(work)  # caches, allocator, lazy parts

    times: dict[bool, list[float]] = {True: [], False: []}
    refresh = config.advantage.shaping.refresh
    for update in range(1, UPDATES):
        spent = seconds(lambda: learner.update(work))
        times[update % refresh == 0].append(spent)
    measured, plain = (statistics.median(times[kind]) for kind in (True, False))
    share = (measured - plain) / (refresh * (plain + drawing) + measured - plain)
    print(f"an estimate {measured - plain:.3f} s, an update {plain:.3f} s and its rollouts {drawing:.3f} s of one core")
    print(f"with an estimate every {refresh} updates: {100 * share:.2f} % of the step")


if __name__ == "__main__":
    main()
