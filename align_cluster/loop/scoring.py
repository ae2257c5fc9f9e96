"""Feeds one pool of reward workers for one draw: decides what is scored together and when the pool grows."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from align_cluster.cluster.pool import DEPTH, Done, Pool
from align_cluster.cluster.slots import GivenUp
from align_cluster.config.plan import RewardPool
from align_cluster.rewards.mix import concatenate, unscored
from align_cluster.types import Chunk, ChunkId, Scores


class Drawn(NamedTuple):
    """Holds a drawn chunk, a reference to its images, and the time when it came."""

    chunk: Chunk
    images: Any
    since: float


class Rows(NamedTuple):
    """Names rows `start` to `stop` of a chunk, whose images `images` refers to."""

    chunk: Chunk
    images: Any
    start: int
    stop: int


Family = list[tuple[Sequence[Rows], GivenUp | None]]


@dataclass(eq=False)
class Batch:
    """Holds rows that a worker scores together, as the key of the call that does it.

    `family` collects how the call ended; the two halves of a batch that was given up share one.
    """

    parts: Sequence[Rows]
    family: Family = field(default_factory=list)
    half: bool = False

    def __str__(self) -> str:
        return ", ".join(f"{part.chunk.id}[{part.start}:{part.stop}]" for part in self.parts)


class Scoring:
    """Hands chunks to the pool as they are drawn.

    Ordered batches are consecutive chunks of the step, whichever is drawn first. The last bits of a score may depend on
    what else is in its batch, and are then the same in every run. Dynamic batches are whatever waits when a worker has
    room. A chunk with more images than a batch goes alone.

    The pool gives up a batch that its workers die of or hang on. Its halves are then scored apart, and so on, until the
    rows that are to blame are alone. Where both halves are given up, no row is to blame, and none has a score.
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
        self.working: set[ChunkId] = set()  # those of `drawn` that are with a worker
        self.found: dict[ChunkId, dict[int, Scores]] = {}  # by first row, of chunks of which rows are missing
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
            if chunk.id not in self.working:
                self.drawn[chunk.id] = self.drawn[chunk.id]._replace(images=images)
            return
        self.drawn[chunk.id] = Drawn(chunk, images, time.perf_counter())
        self.depth += len(chunk)
        self.deepest = max(self.deepest, self.depth)
        if self.depth > 2 * DEPTH * self.batch * len(self.pool.ready_workers):
            self.pool.grow()
        if not self.settings.ordered:
            self.waiting[chunk.id] = chunk
            self.feed()
            return
        if all(other.id in self.drawn for other in self.planned[chunk.id]):
            self._submit(self.planned[chunk.id])

    def collect(self, done: Done) -> dict[ChunkId, Scores]:
        """Return the scores of the chunks that a finished call completes, by their ids."""
        if isinstance(done.value, GivenUp):
            self._end(done.key, done.value)
        else:
            self._keep(done.key.parts, done.value)
            self._end(done.key)
        self.feed()
        return self._completed()

    def withdraw(self, done: Done) -> list[tuple[Chunk, Any]]:
        """Return the chunks of a call that found images missing, with the references that it had. They must be added
        again with new ones, and are then scored as a whole."""
        parts = self._current(done.key.parts)
        for part in parts:
            self._forget(part.chunk.id)
            self.planned[part.chunk.id] = [one.chunk for one in parts]
        self._end(done.key)
        return [(part.chunk, part.images) for part in parts]

    def _end(self, batch: Batch, given_up: GivenUp | None = None) -> None:
        """Take note that a call ended. Where it and its other half have, look for the rows to blame in what was given
        up."""
        batch.family.append((batch.parts, given_up))
        if len(batch.family) < 1 + batch.half:
            return
        failed = [(self._current(parts), reason) for parts, reason in batch.family if reason]
        for parts, reason in failed:
            if len(failed) == 2 or count(parts) < 2:
                why = (self.settings.rewards, reason.kind, reason.message)
                self._keep(parts, [unscored(*why, count([part])) for part in parts])
                continue
            family: Family = []
            for half in halves(parts):
                self._call(Batch(half, family, True), tries=1)

    def _keep(self, parts: Sequence[Rows], found: Sequence[Scores]) -> None:
        """Take in the scores of rows, unless their chunk was withdrawn meanwhile."""
        for part, scores in zip(parts, found, strict=True):
            if self._current([part]):
                self.found.setdefault(part.chunk.id, {})[part.start] = scores

    def _completed(self) -> dict[ChunkId, Scores]:
        """Take out the scores of chunks whose rows all have come."""
        complete = {}
        for key, parts in list(self.found.items()):
            scores = concatenate([parts[start] for start in sorted(parts)])
            size = len(next(iter(scores.valid.values())))
            if size < len(self.drawn[key].chunk):
                continue
            complete[key] = scores
            self.latencies.append(time.perf_counter() - self.drawn[key].since)
            self.images += size
            for name, seconds in scores.seconds.items():
                self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self._forget(key)
        self.scored.update(complete)
        return complete

    def _current(self, parts: Sequence[Rows]) -> list[Rows]:
        """Return those rows whose images are still the ones that their chunk has."""
        return [one for one in parts if one.chunk.id in self.drawn and self.drawn[one.chunk.id].images is one.images]

    def _forget(self, key: ChunkId) -> None:
        self.depth -= len(self.drawn.pop(key).chunk)
        self.working.discard(key)
        self.found.pop(key, None)

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

    def feed(self) -> None:
        """Hand out what waits for dynamic batches, as long as a worker has room."""
        while self.waiting and self.pool.has_room:
            batch = next(batches(self.waiting.values(), self.batch))
            for chunk in batch:
                del self.waiting[chunk.id]
            self._submit(batch)

    def _submit(self, chunks: Sequence[Chunk]) -> None:
        self.working.update(chunk.id for chunk in chunks)
        self.fills.append(min(1.0, sum(map(len, chunks)) / self.batch))
        self._call(Batch([Rows(chunk, self.drawn[chunk.id].images, 0, len(chunk)) for chunk in chunks]))

    def _call(self, batch: Batch, tries: int | None = None) -> None:
        prompts = [part.chunk.prompts[part.start : part.stop] for part in batch.parts]
        starts, images = [part.start for part in batch.parts], [part.images for part in batch.parts]
        self.pool.submit(batch, "score_chunks", prompts, starts, *images, tries=tries)


def count(parts: Sequence[Rows]) -> int:
    """Count rows."""
    return sum(part.stop - part.start for part in parts)


def halves(parts: Sequence[Rows]) -> tuple[list[Rows], list[Rows]]:
    """Return the first half of the rows, and the others."""
    first, second, left = [], [], count(parts) // 2
    for part in parts:
        middle = min(part.start + left, part.stop)
        left -= middle - part.start
        first += [part._replace(stop=middle)] if middle > part.start else []
        second += [part._replace(start=middle)] if part.stop > middle else []
    return first, second


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
