"""A step's work on its way to the learner's ranks, and their metrics on the way back.

Pure functions and records, so that neither the work nor its result depends on the number of ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from align_cluster.prompts.groups import even_spans
from align_cluster.rollouts.guidance import TextBatch
from align_cluster.types import Condition, Perturbation, Record, ReplayBatch


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Holds rows `start` to `stop` of chunk number `source`, which are part of optimiser update `update` of the step.

    `advantages` fp32 [stop - start] and `weights` fp32 [stop - start] (1, or 0 where the sample is masked or the
    micro-batch is padding). With a critic, advantages are [stop - start, N], one for each denoising step, and `returns`
    and `values` are [stop - start, N, R], one for each reward.
    """

    update: int
    source: int
    start: int
    stop: int
    advantages: np.ndarray
    weights: np.ndarray
    returns: np.ndarray | None = None
    values: np.ndarray | None = None

    @property
    def rows(self) -> slice:
        """The rows in their chunk."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class TrainingChunk:
    """Pairs what a sampler recorded of one chunk with the conditions of its texts, under which the policy trains.

    `perturbations` of its perturbed texts are there where the policy trains under these.
    """

    record: Record
    conditions: Mapping[str, Condition]
    perturbations: Mapping[str, Perturbation] = field(default_factory=dict)

    def text(self, null: Condition | None, device: torch.device, rows: slice = slice(None)) -> TextBatch:
        """Return the conditions of these rows."""
        texts = [row.prompt.text for row in self.record.chunk.rows[rows]]
        return TextBatch.build([self.conditions[text] for text in texts], null, device)

    def perturbed_text(
        self,
        insert: Callable[[Condition, Perturbation, int], Condition],
        null: Condition | None,
        device: torch.device,
        rows: slice,
    ) -> TextBatch:
        """Return the conditions that these rows were drawn under at full strength; `insert` is the backbone's."""
        return TextBatch.perturbed(
            self.record.chunk.rows[rows], self.conditions, self.perturbations, insert, null, device
        )


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """Holds all that one rank needs for one step of training.

    The micro-batches' `source` counts in `chunks`. `totals` give the sum of sample weights of each update over all
    ranks. `null` is the empty prompt's condition where guidance needs it. Without `train_actor` only the critic learns.
    Where it learns from replayed states, `replay` has this rank's share of each of its updates, and `replay_conditions`
    those of their texts. `fresh` says that the policy's weights are still those that drew the samples.
    """

    step: int
    micro_batches: Sequence[MicroBatch]
    chunks: Sequence[TrainingChunk]
    totals: dict[int, float]
    null: Condition | None = None
    train_actor: bool = True
    fresh: bool = True
    replay: tuple[ReplayBatch, ...] | None = None
    replay_conditions: Mapping[str, Condition] = field(default_factory=dict)

    @property
    def replay_texts(self) -> list[str]:
        """Return the different texts of replayed states, in their order."""
        return list(dict.fromkeys(text for batch in self.replay or () for text in batch.texts))

    def chunk_of(self, micro_batch: MicroBatch) -> TrainingChunk:
        """Return the chunk that a micro-batch's rows belong to."""
        return self.chunks[micro_batch.source]


class Part(NamedTuple):
    """Rows `start` to `stop` of chunk number `source`, which are part of optimiser update `update` of the step."""

    update: int
    source: int
    start: int
    stop: int


def assign_updates(lengths: Sequence[int], bounds: Sequence[int], size: int) -> list[Part]:
    """Cut the rows of a step, which are in chunks of these lengths, into parts of one chunk and one update.

    Update u takes the rows from `bounds[u]` to `bounds[u + 1]`. A part has at most `size` rows.
    """
    begins = np.cumsum([0, *lengths]).tolist()
    parts = []
    for update, (first, last) in enumerate(pairwise(bounds)):
        for source, (begin, end) in enumerate(pairwise(begins)):
            low, high = max(first, begin), min(last, end)
            parts += [
                Part(update, source, start - begin, stop - begin)
                for start, stop in (even_spans(low, high, size) if low < high else ())
            ]
    return parts


def make_micro_batches(
    advantages: Sequence[np.ndarray],
    valid: Sequence[np.ndarray],
    *,
    bounds: Sequence[int],
    size: int,
    targets: dict[str, list[np.ndarray]] | None = None,
) -> list[MicroBatch]:
    """Cut a step into micro-batches of at most `size` samples, ordered by update; for `bounds` see `assign_updates`.

    `advantages` and `valid` have one array a chunk. `targets` give the critic's `returns` and `values` of each chunk. A
    masked sample gets weight 0 and advantage 0, even where its advantage is not a number.
    """
    found = []
    for update, source, start, stop in assign_updates([len(rows) for rows in valid], bounds, size):
        weights = valid[source][start:stop].astype(np.float32)
        given = advantages[source][start:stop]
        given = np.where(weights.reshape(-1, *[1] * (given.ndim - 1)) > 0, given, 0).astype(np.float32)
        more = {name: columns[source][start:stop].astype(np.float32) for name, columns in (targets or {}).items()}
        found.append(
            MicroBatch(update=update, source=source, start=start, stop=stop, advantages=given, weights=weights, **more)
        )
    return found


def rank_share(micro_batches: Sequence[MicroBatch], rank: int, world: int) -> tuple[list[MicroBatch], list[int]]:
    """Return one rank's micro-batches and the numbers of the chunks that it needs; `source` then counts in these.

    A rank gets every world-th micro-batch of each update. Copies without weight pad the shares, so that all ranks run
    equally many and meet in the same collectives.
    """
    mine = []
    for update in sorted({item.update for item in micro_batches}):
        of_update = [item for item in micro_batches if item.update == update]
        rounds = -(-len(of_update) // world)
        for number in range(rounds):
            index = number * world + rank
            item = of_update[index % len(of_update)]
            mine.append(item if index < len(of_update) else replace(item, weights=np.zeros_like(item.weights)))
    sources = sorted({item.source for item in mine})
    return [replace(item, source=sources.index(item.source)) for item in mine], sources


def total_weights(micro_batches: Sequence[MicroBatch]) -> dict[int, float]:
    """Return the sum of sample weights of each update over all ranks."""
    totals: dict[int, float] = {}
    for item in micro_batches:
        totals[item.update] = totals.get(item.update, 0.0) + float(item.weights.sum())
    return totals


def rank_work(
    step: int,
    micro_batches: Sequence[MicroBatch],
    chunks: Sequence[Any],
    *,
    rank: int = 0,
    world: int = 1,
    null: Condition | None = None,
    train_actor: bool = True,
    replay: Sequence[ReplayBatch] | None = None,
    replay_conditions: Mapping[str, Condition] = MappingProxyType({}),
    fresh: bool = True,
) -> StepWork:
    """Return one rank's work for a step. `chunks` are all of the step; the work holds those that the rank needs."""
    mine, sources = rank_share(micro_batches, rank, world)
    return StepWork(
        step=step,
        micro_batches=mine,
        chunks=[chunks[source] for source in sources],
        totals=total_weights(micro_batches),
        null=null,
        train_actor=train_actor,
        replay=None if replay is None else tuple(batch.share(rank, world) for batch in replay),
        replay_conditions=replay_conditions,
        fresh=fresh,
    )


class Judged(NamedTuple):
    """Holds what a critic says of a rank's chunks, and the states of them that are kept for replay.

    values   [B, N, R] of each chunk: of every recorded state
    kept     states fp16 [B, K, C, H, W] of each chunk, or none without replay
    places   [B, K] of each chunk: the denoising steps that those states stand before
    sigmas   the rollout's noise levels [N + 1], or None without chunks
    slots    the denoising steps that are trained
    """

    values: list[np.ndarray]
    kept: list[np.ndarray]
    places: list[np.ndarray]
    sigmas: np.ndarray | None
    slots: tuple[int, ...]


class RankMetric(NamedTuple):
    """Sums one metric on one rank, so that the mean over all ranks can be taken later."""

    total: float
    weight: float
    largest: float


class Reduced(NamedTuple):
    """One metric over all ranks: the weighted mean, and the largest magnitude."""

    mean: float
    largest: float


class MetricSums:
    """Collects the metrics of one rank during a step."""

    def __init__(self) -> None:
        self.sums: dict[str, RankMetric] = {}

    def add(self, name: str, value: float, weight: float = 1.0, largest: float | None = None) -> None:
        """Add a value that counts with `weight`; `largest` is its magnitude where `value` is a sum already."""
        total, weights, most = self.sums.get(name, (0.0, 0.0, 0.0))
        magnitude = abs(value) if largest is None else largest
        self.sums[name] = RankMetric(total + value, weights + weight, max(most, magnitude))


def reduce_metrics(ranks: Sequence[dict[str, RankMetric]]) -> dict[str, Reduced]:
    """Reduce each metric over all ranks that have it."""
    reduced = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        entries = [rank[name] for rank in ranks if name in rank]
        weight = sum(entry[1] for entry in entries)
        mean = sum(entry[0] for entry in entries) / max(weight, 1e-9)
        reduced[name] = Reduced(mean, max(entry[2] for entry in entries))
    return reduced
