"""Feeds one pool of reward workers during a draw: decides what is scored together and when the pool grows."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from align_cluster.cluster.pool import DEPTH, Done, Pool
from align_cluster.cluster.slots import GivenUp
from align_cluster.config.plan import RewardPool
from align_cluster.rewards.mix import unscored
from align_cluster.types import Chunk, ChunkId, Failure, Scores


class Drawn(NamedTuple):
    """Holds a drawn chunk, a reference to its images, and the time when it came."""

    chunk: Chunk
    images: Any
    since: float


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
        self.batch = self.settings.batch or max(map(len, chunks))
        self.drawn: dict[ChunkId, Drawn] = {}
        self.waiting: dict[ChunkId, Chunk] = {}  # dynamic batching alone
        planned = list(batches(chunks, self.batch)) if self.settings.ordered else []
        self.planned = {chunk.id: batch for batch in planned for chunk in batch}
        self.scored: set[ChunkId] = set()
        self.latencies: list[float] = []
        self.fills: list[float] = []
        self.images = self.depth = self.deepest = 0
        self.seconds: dict[str, float] = {}

    def add(self, chunk: Chunk, images: Any) -> None:
        """Take a drawn chunk; `images` is a reference. A chunk that this pool has scored already, or is scoring, may
        come again because another pool lost it."""
        if chunk.id in self.scored:
            return
        if chunk.id in self.drawn:
            if chunk.id in self.waiting or not self._complete(chunk):  # it is not with a worker yet
                self.drawn[chunk.id] = self.drawn[chunk.id]._replace(images=images)
            return
        self.drawn[chunk.id] = Drawn(chunk, images, time.perf_counter())
        self.depth += len(chunk)
        self.deepest = max(self.deepest, self.depth)
        if self.depth > 2 * DEPTH * self.batch * len(self.pool.ready_workers):
            self.pool.grow()
        if not self.settings.ordered:
            self.waiting[chunk.id] = chunk
            self._submit_waiting()
            return
        if self._complete(chunk):
            self._submit(self.planned[chunk.id])

    def collect(self, done: Done) -> dict[ChunkId, Scores]:
        """Return the scores that a finished call holds, by the ids of their chunks."""
        drawn = self._take(done)
        self.latencies += [time.perf_counter() - one.since for one in drawn]
        if isinstance(done.value, GivenUp):
            reason, rewards = done.value, self.settings.rewards
            found = [unscored(rewards, Failure(reason.kind, reason.message, len(one.chunk))) for one in drawn]
        else:
            found = done.value
        for scores in found:
            self.images += len(next(iter(scores.valid.values())))
            for name, seconds in scores.seconds.items():
                self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.scored.update(done.key)
        self._submit_waiting()
        return dict(zip(done.key, found, strict=True))

    def withdraw(self, done: Done) -> list[tuple[Chunk, Any]]:
        """Return the chunks of a call that found images missing, with the references that it had. They must be added
        again with new ones."""
        return [(one.chunk, one.images) for one in self._take(done)]

    def _complete(self, chunk: Chunk) -> bool:
        """Tell whether all chunks of this one's planned batch are drawn, and so with a worker."""
        return all(other.id in self.drawn for other in self.planned.get(chunk.id, ()))

    def _take(self, done: Done) -> list["Drawn"]:
        drawn = [self.drawn.pop(key) for key in done.key]
        self.depth -= sum(len(one.chunk) for one in drawn)
        return drawn

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

    def _submit_waiting(self) -> None:
        """Hand out what waits for dynamic batches, as long as a worker has room."""
        while self.waiting and self.pool.has_room:
            batch = next(batches(self.waiting.values(), self.batch))
            for chunk in batch:
                del self.waiting[chunk.id]
            self._submit(batch)

    def _submit(self, batch: Sequence[Chunk]) -> None:
        self.fills.append(min(1.0, sum(map(len, batch)) / self.batch))
        images = [self.drawn[chunk.id].images for chunk in batch]
        self.pool.submit(
            tuple(chunk.id for chunk in batch), "score_chunks", [chunk.prompts for chunk in batch], *images
        )


def batches(chunks: Iterable[Chunk], size: int) -> Iterator[list[Chunk]]:
    """Yield consecutive chunks with at most `size` images together, or one chunk that has more."""
    batch: list[Chunk] = []
    for chunk in chunks:
        if batch and sum(map(len, batch)) + len(chunk) > size:
            yield batch
            batch = []
        batch.append(chunk)
    if batch:
        yield batch
