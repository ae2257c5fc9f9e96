"""The driver's side of the learner: a step's work for its ranks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from align_cluster.cluster.learners import LearnerGroup, RankWork
from align_cluster.config.plan import Plan
from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import (
    Judged,
    MicroBatch,
    RankMetric,
    Reduced,
    make_micro_batches,
    rank_work,
    reduce_metrics,
)
from align_cluster.loop.conditions import ConditionStore
from align_cluster.loop.rollouts import DrawnChunk, RolloutCollector
from align_cluster.loop.syncing import WeightSync
from align_cluster.types import Chunk, Credit, Prompt


class CriticValues(NamedTuple):
    """Holds the critic's values [S, N, R] of all states of all samples of a step, and the noise levels [N + 1].

    `slots` are the denoising steps that train the actor (None: all). With replay, `kept` are states fp16
    [S, K, C, H, W] of the samples and `places` [S, K] the steps that they stand before.
    """

    values: np.ndarray
    sigmas: np.ndarray
    slots: tuple[int, ...] | None = None
    kept: np.ndarray | None = None
    places: np.ndarray | None = None


def joined(answers: Sequence[Judged]) -> CriticValues:
    """Return what ranks said together; rank r had every world-th chunk, from number r on."""

    def column(name: str) -> np.ndarray | None:
        parts = [getattr(answer, name) for answer in answers]
        found = [None] * sum(map(len, parts))
        for rank, own in enumerate(parts):
            found[rank :: len(parts)] = own
        return np.concatenate(found) if found else None

    first = answers[0]
    return CriticValues(column("values"), first.sigmas, first.slots, column("kept"), column("places"))


class LearnerClient:
    """Shares a step's samples out among the learner's ranks.

    Ranks that have their records wait for the others. So where a record is lost, all ranks start anew.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        ranks: LearnerGroup,
        conditions: ConditionStore,
        rollouts: RolloutCollector,
        weights: WeightSync,
    ) -> None:
        self.config, self.plan, self.ranks = config, plan, ranks
        self.conditions, self.rollouts, self.weights = conditions, rollouts, weights

    def values(self, drawn: list[DrawnChunk]) -> CriticValues:
        """Ask the critic for its values of a step's samples."""
        world = self.plan.learners

        def ask() -> list[tuple]:
            return self.ranks.values([self._data(drawn[rank::world]) for rank in range(world)])

        return joined(self.rollouts.recover(drawn, ask, self.ranks.shutdown))

    def update(self, step: int, drawn: list[DrawnChunk], credit: Credit) -> dict[str, Reduced]:
        """Train on one step's samples and return the learner's metrics over all ranks."""
        world = self.plan.learners
        micro_batches = step_micro_batches(self.config, [item.chunk for item in drawn], credit)
        order = drawn[0].order
        if credit.replay:
            self.conditions.encode([Prompt(-1, text) for batch in credit.replay for text in batch.texts])
        fresh = not self.weights.staleness(order.request.version)
        more = {"train_actor": credit.actor, "fresh": fresh, "replay": credit.replay}

        def share(rank: int) -> RankWork:
            work = rank_work(step, micro_batches, drawn, rank=rank, world=world, **more)
            replayed = [self.conditions.of(text) for text in work.replay_texts]
            return RankWork(replace(work, chunks=()), self._data(work.chunks) + replayed)

        def ask() -> list[dict[str, RankMetric]]:
            return self.ranks.update([share(rank) for rank in range(world)], order.texts.null)

        return reduce_metrics(self.rollouts.recover(drawn, ask, self.ranks.shutdown))

    def _data(self, drawn: Sequence[DrawnChunk]) -> list[Any]:
        """Return references to each record, the conditions of its texts, and where updates see them the perturbed ones,
        as a rank takes them."""
        found = []
        for item in drawn:
            known = list(item.order.texts.conditions.values())
            if self.config.update_exploration:
                known += item.order.texts.perturbed.values()
            found += [item.record, *(stored.reference for stored in known)]
        return found


def step_micro_batches(config: RunConfig, chunks: Sequence[Chunk], credit: Credit) -> list[MicroBatch]:
    """Cut a step's chunks with their credit into micro-batches."""
    ends = np.cumsum([len(chunk) for chunk in chunks])[:-1]

    def by_chunk(table: np.ndarray) -> list[np.ndarray]:
        return np.split(table.reshape(-1, *table.shape[2:]), ends)

    targets = None
    if credit.returns is not None:
        targets = {"returns": by_chunk(credit.returns), "values": by_chunk(credit.values)}
    return make_micro_batches(
        by_chunk(credit.advantages),
        by_chunk(credit.valid),
        bounds=config.update_bounds,
        size=config.learner.micro_batch,
        targets=targets,
    )
