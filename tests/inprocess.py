"""A whole run in this process: one sampler, one reward worker and one learner rank as plain objects, without Ray.

Each step takes the path of a real one: it plans groups, encodes and perturbs texts, draws, scores, assigns advantages,
cuts micro-batches, updates, publishes and adopts, with the functions that a run on Ray calls for each of these. This is
the only file of the tests that knows how those functions fit together.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from align_cluster.algorithms import ALGORITHMS
from align_cluster.backbones import BACKBONES
from align_cluster.config.plan import evaluation_pieces, settle
from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import Reduced, TrainingChunk, rank_work, reduce_metrics
from align_cluster.learner.worker import Learner
from align_cluster.loop.advantages import AdvantageEstimator
from align_cluster.loop.clock import Clock
from align_cluster.loop.critic_advantages import CriticAdvantageEstimator
from align_cluster.loop.learning import CriticValues, joined, step_micro_batches
from align_cluster.loop.requests import evaluation_request, plan_chunks, training_request
from align_cluster.loop.rollouts import DrawnChunk
from align_cluster.loop.summary import Results, step_metrics
from align_cluster.loop.syncing import Sync
from align_cluster.observe.metrics import describe
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import read_jsonl
from align_cluster.observe.table import rows as score_rows
from align_cluster.observe.table import summarise
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.groups import plan_evaluation
from align_cluster.rewards.worker import RewardWorker
from align_cluster.rollouts.sampler import DrawRequest, Sampler, fingerprint, keys_of
from align_cluster.types import Chunk, Credit, Perturbation, Prompt
from align_cluster.weights import check, view

MOMENTARY = ("time/", "throughput/", "scoring/", "weights/adopt_s", "weights/version")


@dataclass(frozen=True)
class Finished:
    """Holds what a run in this process ends with.

    rows        metrics of each step, as metrics.jsonl has them
    self_check  as in summary.json
    before      held-out scores of the base model, by column
    after       held-out scores of the LoRA that is kept, by column
    checksums   checksum of the policy's weights before the first step and after each step
    lora        the file of the LoRA
    """

    rows: list[dict[str, float]]
    self_check: dict[str, float] | None
    before: dict[str, float]
    after: dict[str, float]
    checksums: list[str]
    lora: Path


def train(config: RunConfig, folder: Path, device: str = "cpu") -> Finished:
    """Run all steps of `config` on one device; the LoRA goes to `folder`."""
    with own_environment():
        workers = Workers(config, device)
        config = workers.config
        estimator = (CriticAdvantageEstimator if workers.algorithm.critic else AdvantageEstimator)(config)
        prompts, held_out = (
            PROMPTS[source.kind](source).load() for source in (config.prompts, config.evaluate.prompts)
        )
        results, rows, clock = Results(before=workers.evaluate(held_out)), [], Clock()
        syncs = [workers.publish("behaviour")] * (1 + config.loop.ahead)  # the first one draws the next step
        checksums = [syncs[0].manifest.checksum]
        for step in range(config.steps):
            clock.next_step(step + 1)
            chunks = plan_chunks(config, prompts, step)
            texts = [text for chunk in chunks for text in chunk.texts]
            explored = workers.explore(texts, step) if config.exploration else {}
            workers.adopt(syncs[0])
            drawn = workers.draw(chunks, training_request(config, step, syncs[0].manifest.version))
            fresh = syncs[0].manifest.checksum == checksums[-1]
            credit = estimator.assign(drawn, workers.values(drawn) if workers.algorithm.critic else None)
            trained = workers.update(step, drawn, credit, fresh)
            explored |= {"staleness": float(not fresh)}
            explored |= estimator.observe(drawn, trained)
            results.check_ratio(trained, config.learner.ratio_tolerance)
            sync = workers.publish("behaviour")
            rows.append({"step": step + 1} | explored | step_metrics(config, drawn, credit, trained, clock, sync))
            checksums.append(sync.manifest.checksum)
            syncs = [*syncs[1:], sync]
        sync = workers.publish("evaluation")
        weights = {tensor.name: view(sync.buffer, tensor) for tensor in sync.manifest.tensors}
        lora = BACKBONES[config.backbone.kind](config.backbone).save_lora(weights, folder)
        results.after = workers.evaluate(held_out)
        return Finished(rows, results.self_check, results.before, results.after, checksums, lora)


def assert_same_run(here: Finished, folder: Path) -> None:
    """Assert that the run on Ray in `folder` has the metrics, the scores and the LoRA of `here`, bit by bit."""
    run = RunDir(folder)
    for ours, theirs in zip(here.rows, read_jsonl(run.metrics), strict=True):
        assert all(describe(name) for name in theirs.keys() - {"step", "seconds"})
        assert lasting(ours) == {name: theirs[name] for name in lasting(ours)} and theirs["time/step"] > 0
    summary = json.loads(run.summary.read_text())
    assert summary["self_check"] == here.self_check
    assert [summary[when]["overall"] for when in ("before", "after")] == [here.before, here.after]
    ours, theirs = (load_file(path) for path in (here.lora, run.lora_weights))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def lasting(row: dict[str, float]) -> dict[str, float]:
    """Return those of a step's metrics that do not depend on when and where the step was taken."""
    return {name: value for name, value in row.items() if not name.startswith(MOMENTARY) and "images_per_s" not in name}


class Workers:
    """Holds one worker of each kind, and does with them what the driver of a run does."""

    def __init__(self, config: RunConfig, device: str = "cpu") -> None:
        self.config = config = settle(config, 2, 0)
        self.algorithm = ALGORITHMS[config.algorithm.kind](config.algorithm)
        self.sampler = Sampler(config.backbone, device=device, merge=config.rollout.merge_lora)
        self.rewards = RewardWorker(dict(config.rewards), device=device)
        self.learner = Learner(config.learner_setup, 0, 1, "127.0.0.1", free_port(), device=device)
        self.conditions: dict = {}
        self.perturbations: dict[str, Perturbation] = {}
        self.version = 0

    def encode(self, texts: list[str]) -> None:
        """Encode the texts that are new."""
        new = [text for text in dict.fromkeys(texts) if text not in self.conditions]
        self.conditions.update(zip(new, self.sampler.encode(new), strict=True))

    def explore(self, texts: list[str], step: int) -> dict[str, float]:
        """Learn the perturbed conditions of the texts that are new; returns their distance from the original."""
        texts, asked = list(dict.fromkeys(texts)), self.config.exploration
        if asked.learned == "each_time":
            self.perturbations.clear()
        new = [text for text in texts if text not in self.perturbations]
        self.perturbations.update(
            zip(new, self.sampler.perturb(new, asked, asked.seed_in(self.config.seed, step)), strict=True)
        )
        return {"explore/anchor_cosine": float(np.mean([self.perturbations[text].cosines.mean() for text in texts]))}

    def draw(self, chunks: list[Chunk], request: DrawRequest) -> list[DrawnChunk]:
        """Draw and score the chunks, each exactly as it was asked for."""
        self.encode([text for chunk in chunks for text in chunk.texts] + [""] * (request.guidance > 1))
        null, drawn = self.conditions[""] if request.guidance > 1 else None, []
        for chunk in chunks:
            own = {text: self.conditions[text] for text in chunk.texts}
            perturbed = {text: self.perturbations[text] for text in chunk.perturbed_texts}
            info, images, record = self.sampler.draw(chunk, own, null, request, perturbed)
            assert info.fingerprint == fingerprint(chunk, request, keys_of(own), keys_of(perturbed))
            drawn.append(DrawnChunk(info, images, record, self.rewards.score(images, chunk.prompts), None))
        return drawn

    def training_chunks(self, drawn: list[DrawnChunk]) -> list[TrainingChunk]:
        """Return what the learner reads of drawn chunks."""
        return [TrainingChunk(item.record, self.conditions, self.perturbations) for item in drawn]

    def values(self, drawn: list[DrawnChunk]) -> CriticValues:
        """Return the critic's values of all samples."""
        return joined([self.learner.values(self.training_chunks(drawn))])

    def update(self, step: int, drawn: list[DrawnChunk], credit: Credit, fresh: bool = True) -> dict[str, Reduced]:
        """Train on one step's samples; return the learner's metrics."""
        chunks = [item.chunk for item in drawn]
        micro_batches = step_micro_batches(self.config, chunks, credit)
        null = self.conditions[""] if self.config.rollout.guidance > 1 else None
        pairs = self.training_chunks(drawn)
        replay = {"replay": credit.replay, "replay_conditions": self.conditions}
        work = rank_work(step, micro_batches, pairs, null=null, train_actor=credit.actor, fresh=fresh, **replay)
        return reduce_metrics([self.learner.update(work)])

    def publish(self, source: str) -> Sync:
        """Give the sampler the learner's adapter, and prove that it holds it."""
        self.version += 1
        started = time.perf_counter()
        sync = Sync(*self.learner.publish(source, self.version), time.perf_counter() - started)
        self.adopt(sync)
        return sync

    def adopt(self, sync: Sync) -> None:
        """Give the sampler published weights, and prove that it holds them."""
        check(sync.manifest, [self.sampler.adopt(sync.manifest, sync.buffer)], 1)

    def evaluate(self, held_out: list[Prompt]) -> dict[str, float]:
        """Return the held-out scores of the weights that the sampler holds."""
        asked = self.config.evaluate
        batches = {"chunk": self.config.rollout.chunk, "pieces": evaluation_pieces(self.config)}
        chunks = plan_evaluation(held_out, asked.count, asked.images_per_prompt, seed=self.config.seed, **batches)
        drawn = self.draw(chunks, evaluation_request(self.config, self.version))
        return summarise([row for item in drawn for row in score_rows(item.chunk.prompts, item.scores)])["overall"]


@contextmanager
def own_environment() -> Iterator[None]:
    """Keep what a learner writes into the environment inside. Its process group stays, since DeepSpeed can use no
    second one in a process."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
