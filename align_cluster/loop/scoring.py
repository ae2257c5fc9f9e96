"""Feeds one pool of reward workers during a draw: decides what is scored together and when the pool grows."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from align_cluster.cluster.pool import DEPTH, Done, Pool
from align_cluster.cluster.slots import GivenUp
from align_cluster.config.plan import RewardPool
from align_cluster.rewards.mix import unscored
from align_cluster.types import Chunk, ChunkId, Failure, Scores


class Scoring:
    """Hands chunks to the pool as they are drawn.

    Ordered batches are consecutive chunks of the step, whichever is drawn first. The last bits of a score may depend on
    what else is in its batch, and are then the same in every run. Dynamic batches are whatever waits when a worker has
    room. A chunk with more images than a batch goes alone.
    """

    def __init__(self, pool: Pool, settings: RewardPool) -> None:
        self.pool, self.settings = pool, settings

    def begin(self, chunks: Sequence[Chunk]) -> None:
        """Get ready for the chunks of one draw."""
        self.batch = self.settings.batch or max(len(chunk.seeds) for chunk in chunks)
        self.drawn: dict[
            ChunkId, tuple[Chunk, Any, float]
        ] = {}  # with a reference to the images, and the time when they were drawn
        self.waiting: dict[ChunkId, Chunk] = {}
        self.planned = list(batches(chunks, self.batch)) if self.settings.ordered else []
        self.scored: set[ChunkId] = set()
        self.latencies: list[float] = []
        self.fills: list[float] = []
        self.images = self.deepest = 0
        self.seconds: dict[str, float] = {}

    def add(self, chunk: Chunk, images: Any) -> None:
        """Take a drawn chunk; `images` is a reference. A chunk that this pool has scored already, or is scoring, may
        come again because another pool lost it."""
        if chunk.id in self.scored or (chunk.id in self.drawn and chunk.id not in self.waiting):
            return
        self.drawn[chunk.id] = (chunk, images, time.perf_counter())
        self.waiting[chunk.id] = chunk
        depth = sum(len(waiting.seeds) for waiting, *_ in self.drawn.values())
        self.deepest = max(self.deepest, depth)
        if depth > 2 * DEPTH * self.batch * len(self.pool.ready_workers):
            self.pool.grow()
        self._submit()

    def collect(self, done: Done) -> dict[ChunkId, Scores]:
        """Return the scores that a finished call holds, by the ids of their chunks."""
        chunks = [self.drawn.pop(key) for key in done.key]
        self.latencies += [time.perf_counter() - since for *_, since in chunks]
        if isinstance(done.value, GivenUp):
            reason, rewards = done.value, self.settings.rewards
            found = [unscored(rewards, Failure(reason.kind, reason.message, len(c.seeds))) for c, *_ in chunks]
        else:
            found = done.value
        for scores in found:
            self.images += len(next(iter(scores.valid.values())))
            for name, seconds in scores.seconds.items():
                self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.scored.update(done.key)
        self._submit()
        return dict(zip(done.key, found, strict=True))

    def withdraw(self, done: Done) -> list[tuple[Chunk, Any]]:
        """Return the chunks of a call that found images missing, with the references that it had. They must be added
        again with new ones."""
        return [self.drawn.pop(key)[:2] for key in done.key]

    def end(self) -> dict[str, float]:
        """Return the metrics of the draw, and stop workers that were not needed."""
        name = self.settings.name
        values = {
            f"scoring/{name}/queue": float(self.deepest),
            f"scoring/{name}/batch_fill": float(np.mean(self.fills)),
            f"scoring/{name}/p50": float(np.percentile(self.latencies, 50)),
            f"scoring/{name}/p95": float(np.percentile(self.latencies, 95)),
            f"scoring/{name}/workers": float(len(self.pool.ready_workers)),
        }
        self.pool.trim()
        return values | {f"reward/{one}/images_per_s": self.images / spent for one, spent in self.seconds.items()}

    def _submit(self) -> None:
        while chunks := self._next():
            for chunk in chunks:
                del self.waiting[chunk.id]
            self.fills.append(min(1.0, sum(len(chunk.seeds) for chunk in chunks) / self.batch))
            prompts = [[chunk.prompt] * len(chunk.seeds) for chunk in chunks]
            images = [self.drawn[chunk.id][1] for chunk in chunks]
            self.pool.submit(tuple(chunk.id for chunk in chunks), "score_chunks", prompts, *images)

    def _next(self) -> list[Chunk]:
        """Return the batch to score next, empty where there is none yet."""
        if not self.settings.ordered:
            return next(batches(self.waiting.values(), self.batch), []) if self.pool.has_room else []
        return next((chunks for chunks in self.planned if all(chunk.id in self.waiting for chunk in chunks)), [])


def batches(chunks: Iterable[Chunk], size: int) -> Iterator[list[Chunk]]:
    """Yield consecutive chunks with at most `size` images together, or one chunk that has more."""
    batch: list[Chunk] = []
    for chunk in chunks:
        if batch and sum(len(other.seeds) for other in batch) + len(chunk.seeds) > size:
            yield batch
            batch = []
        batch.append(chunk)
    if batch:
        yield batch
