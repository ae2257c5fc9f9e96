"""One rank of the real learner on made-up records, started by test_zero.py:  zero_worker.py RANK WORLD PORT OUT CASE...

A CASE is "<stage>:<algorithm>". Rank 0 pickles {case: [what a step left behind, ...]} to OUT.
"""

import pickle
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.base import Batch, Policy
from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import TrainingChunk, make_micro_batches, rank_work
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.rollouts.steps import FlowSde
from align_cluster.rollouts.windows import Window
from align_cluster.types import Chunk, Condition, Prompt, Record, Row

SIZES = (3, 1, 2)  # members of each chunk: uneven, so that pieces are uneven and ranks need padding
STEPS, MICRO_BATCH = 2, 2
DIRECT = ("srpo", "draft")
SPOILED = ("x0", "before")


def settings(stage: int, algorithm: str) -> RunConfig:
    """fp32, active clipping, a falling learning rate, two updates a step."""
    kinds = {
        "nft": {"kind": "nft", "beta": 0.5, "kl_beta": 0.1, "timesteps": 2, "old": "slow"},
        "grpo": {"kind": "grpo", "clip": 0.01, "kl_beta": 0.04},
        "srpo": {"kind": "srpo", "positive": ["a light"], "negative": ["a dark", "a small"], "margin": 3.0},
        "draft": {"kind": "draft", "last": 2},
    }
    trained = {"kind": "clip_score", "weight": 10} if algorithm in DIRECT else {"kind": "geneval"}
    return RunConfig.model_validate(
        {
            "name": "zero",
            "steps": STEPS,
            "backbone": {"kind": "sd3", "precision": "fp32", "lora": {"rank": 2, "alpha": 3}},
            "prompts": {"kind": "embedded"},
            "rollout": {"steps": 4, "window": {"kind": "fraction", "fraction": 0.5}}
            if algorithm == "grpo"
            else {"steps": 4},
            "rewards": {"trained": trained},
            "algorithm": kinds[algorithm],
            # AdamW would blow rounding errors of vanishing gradients up to the learning rate: eps is well above them.
            "optimizer": {
                "lr": 2e-3,
                "eps": 1e-6,
                "weight_decay": 0.01,
                "max_grad_norm": 0.01,
                "schedule": "linear",
                "flat": 0.5,
            },
            # One of the two that follow rewards' gradients computes its activations twice.
            "learner": {
                "updates_per_step": 2,
                "zero_stage": stage,
                "ema": 0.9,
                "gradient_checkpointing": algorithm == "draft",
            },
            "evaluate": {"prompts": {"kind": "embedded", "split": "held_out"}},
        }
    )


@cache
def conditions() -> list[Condition]:
    """The encoding of each chunk's prompt."""
    names = ("circle", "square", "star")
    return Sampler(settings(0, "nft").backbone).encode([f"a photo of a red {name}" for name in names])


@cache
def records(algorithm: str) -> list[Record]:
    """What samplers with untrained adapters draw, with the first two steps recorded, or the state that DRaFT needs."""
    config = settings(0, algorithm)
    sampler, kind = Sampler(config.backbone), config.algorithm
    if kind.kind in DIRECT:
        request = DrawRequest(0, 4, config.step_kind, window=ALGORITHMS[kind.kind](kind).states(4))
    else:
        request = DrawRequest(0, 4, FlowSde.Config(), window=Window((0, 1, 2, 3), (0, 1), 2))
    texts, found = texts_of(conditions()), []
    for g, size in enumerate(SIZES):
        rows = tuple(Row(Prompt(g, f"p{g}"), g, m, 10 * g + 1 + m, 10 * g + 1 + m) for m in range(size))
        found.append(sampler.draw(Chunk(0, g, rows), texts, None, request)[2])
    return found


def texts_of(conditions: list[Condition]) -> dict[str, Condition]:
    """The conditions by the texts of the chunks."""
    return {f"p{g}": condition for g, condition in enumerate(conditions)}


def credit() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Advantages of both signs and validity of each chunk's rows; two samples are masked."""
    rng = np.random.default_rng(1)
    advantages = [rng.standard_normal(size).astype(np.float32) for size in SIZES]
    valid = [np.ones(size, bool) for size in SIZES]
    valid[0][1] = valid[2][0] = False
    return advantages, valid


def cut_step(step: int) -> list:
    return make_micro_batches(*credit(), bounds=bounds(step), size=MICRO_BATCH)


def bounds(step: int) -> list[int]:
    """The rows at which the two updates of a step begin: they share the chunks in another way each step."""
    return [0, sum(SIZES[: 2 - step % 2]), sum(SIZES)]


def with_states(record: Record) -> Record:
    """A record that has `before`, if only to be spoiled."""
    return record if record.before is not None else replace(record, before=record.x0[:, None])


def root_of_zero(policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss of zero whose gradient is not a number."""
    v = policy.velocity(batch.x0, torch.full((len(batch.x0),), 0.5))
    return (0 * v).flatten(1).sum(1).sqrt(), {}


def run(case: str, rank: int, world: int, port: int) -> list[dict]:
    from align_cluster.backbones.adapters import adapter_parameters
    from align_cluster.learner.worker import Learner

    stage, algorithm = case.split(":")
    config = settings(int(stage), algorithm)
    drawn, texts = records(algorithm), conditions()
    learner = Learner(config.learner_setup, rank, world, "127.0.0.1", port)
    left = []

    def state(name: str) -> dict[str, np.ndarray]:
        parameters = adapter_parameters(learner.denoiser, name)
        with learner.engine.gathered(list(parameters.values())):
            return {key: parameter.detach().clone().numpy() for key, parameter in parameters.items()}

    def publish(version: int) -> dict:
        return {source: learner.publish(source, version) for source in ("behaviour", "evaluation")}

    def chunks(records: list[Record]) -> list[TrainingChunk]:
        return [TrainingChunk(record, texts_of(texts)) for record in records]

    for step in range(STEPS):
        pieces = cut_step(step)
        work = rank_work(step, pieces, chunks(drawn), rank=rank, world=world)
        metrics = learner.update(work)
        left.append({"metrics": metrics, "default": state("default"), "published": publish(step + 1)})

    # First a loss that is not a number, then a finite one without a finite gradient, and then a sound one again.
    spoiled = [
        Record(**(vars(record) | {name: value * np.nan for name, value in vars(record).items() if name in SPOILED}))
        for record in map(with_states, drawn)
    ]
    sound = learner.algorithm.loss
    for given, loss in ((spoiled, sound), (drawn, root_of_zero), (drawn, sound)):
        learner.algorithm.loss = loss
        learner.algorithm.old_decay = lambda updates: None
        metrics = learner.update(rank_work(STEPS, pieces, chunks(given), rank=rank, world=world))
        left.append({"metrics": metrics, "default": state("default"), "published": publish(STEPS)})

    masked = [replace(piece, weights=0 * piece.weights) for piece in pieces]
    metrics = learner.update(rank_work(STEPS, masked, chunks(drawn), rank=rank, world=world))
    left.append({"metrics": metrics, "default": state("default"), "published": publish(STEPS)})
    return left


def main() -> None:
    torch.set_num_threads(1)
    rank, world, port = (int(value) for value in sys.argv[1:4])
    results = {case: run(case, rank, world, port) for case in sys.argv[5:]}
    Path(f"{sys.argv[4]}.{rank}").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main()
