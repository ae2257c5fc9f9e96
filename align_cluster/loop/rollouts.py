"""Drawing and scoring chunks. Tensors stay in the object store; the driver holds references."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ray.exceptions import ObjectLostError

from align_cluster.cluster.errors import reason
from align_cluster.cluster.pool import Done, Pool, fetch, stream
from align_cluster.cluster.slots import InputLost
from align_cluster.config.run import RunConfig
from align_cluster.loop.conditions import ConditionStore
from align_cluster.loop.scoring import Scoring
from align_cluster.rewards.mix import beside
from align_cluster.rollouts.sampler import DrawRequest, fingerprint
from align_cluster.types import Chunk, ChunkId, DrawInfo, Scores

log = logging.getLogger(__name__)
MAX_OBJECT_LOSSES = 3  # lost objects tolerated in one step before the run ends: a node that keeps failing is no chance
Report = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass(frozen=True)
class DrawnChunk:
    """Holds one chunk that was drawn as `request` asks and then scored; `images` and `record` are references."""

    info: DrawInfo
    images: Any
    record: Any
    scores: Scores
    request: DrawRequest

    @property
    def chunk(self) -> Chunk:
        """Return the chunk that was asked for."""
        return self.info.chunk


@dataclass(frozen=True)
class Rollout:
    """Holds the result of one draw: its chunks in the order they were asked for, seconds by stage, and how scoring kept
    up as metrics."""

    drawn: list[DrawnChunk]
    seconds: dict[str, float]
    metrics: dict[str, float]


@dataclass
class _Progress:
    """Keeps how far one draw has come."""

    chunks: dict[ChunkId, Chunk]
    request: DrawRequest
    shown: list[str]
    drawn: dict[ChunkId, tuple] = field(default_factory=dict)
    parts: dict[ChunkId, list[Scores]] = field(default_factory=dict)
    scored: int = 0
    last_drawn: float = field(default_factory=time.perf_counter)


class RolloutCollector:
    """Has chunks drawn by the samplers and scored by the reward workers, each as soon as it is drawn."""

    def __init__(
        self, config: RunConfig, samplers: Pool, scoring: Sequence[Scoring], conditions: ConditionStore, report: Report
    ) -> None:
        self.config, self.samplers, self.scoring = config, samplers, scoring
        self.conditions, self.report = conditions, report
        self.images_drawn = 0

    def draw(self, chunks: Sequence[Chunk], request: DrawRequest) -> Rollout:
        """Draw and score chunks, whose texts must be encoded.

        Stage "rollout" lasts until the last chunk is drawn, "reward" from there until the last score. People see those
        of an evaluation as one stage, "evaluate".
        """
        started = time.perf_counter()
        by_id = {chunk.id: chunk for chunk in chunks}
        shown = ["rollout", "reward"] if chunks[0].step >= 0 else ["evaluate"]
        progress = _Progress(by_id, request, shown, parts={key: [] for key in by_id})
        for chunk in chunks:
            self._submit(chunk, request)
        self._grow()
        for stage in shown:
            self.report(stage, 0, len(chunks))
        for scoring in self.scoring:
            scoring.begin(chunks)
        by_pool = {scoring.pool: scoring for scoring in self.scoring}
        for done in stream(self.samplers, *by_pool):
            if isinstance(done.value, InputLost):
                self._draw_again(by_pool[done.pool].withdraw(done), progress)
            elif done.pool is self.samplers:
                self._take_images(done, progress)
            else:
                self._take_scores(by_pool[done.pool].collect(done), progress)
            self._grow()
        return self._finish(progress, started)

    def _grow(self) -> None:
        """Ask for one sampler more while chunks wait."""
        if self.samplers.waiting:
            self.samplers.grow()

    def _take_images(self, done: Done, progress: _Progress) -> None:
        chunk = progress.chunks[done.key]
        self._verify(done.value, chunk, progress.request)
        progress.drawn[chunk.id] = (done.value, *done.refs)
        for scoring in self.scoring:
            scoring.add(chunk, done.refs[0])
        progress.last_drawn = time.perf_counter()
        if len(progress.shown) > 1:
            self.report(progress.shown[0], len(progress.drawn), len(progress.chunks))

    def _take_scores(self, found: dict[ChunkId, Scores], progress: _Progress) -> None:
        for key, scores in found.items():
            progress.parts[key].append(scores)
            progress.scored += len(progress.parts[key]) == len(self.scoring)
        self.report(progress.shown[-1], progress.scored, len(progress.chunks))

    def _finish(self, progress: _Progress, started: float) -> Rollout:
        chunks = progress.chunks
        metrics = {name: value for scoring in self.scoring for name, value in scoring.end().items()}
        if len(chunks) >= len(self.samplers.workers):  # fewer chunks do not tell how many samplers are needed
            self.samplers.trim()
        self.images_drawn += sum(map(len, chunks.values()))
        order = list(self.config.rewards)
        drawn = [
            DrawnChunk(*progress.drawn[chunk.id], beside(progress.parts[chunk.id], order), progress.request)
            for chunk in chunks.values()
        ]
        seconds = {
            "rollout": progress.last_drawn - started,
            "reward": time.perf_counter() - progress.last_drawn,
        }
        return Rollout(drawn, seconds, metrics)

    def _submit(self, chunk: Chunk, request: DrawRequest) -> None:
        encodings = [self.conditions.of(text) for text in chunk.texts]
        encodings += [self.conditions.perturbed_of(text).reference for text in chunk.perturbed_texts]
        null = self.conditions.null(request.guidance)
        self.samplers.submit(chunk.id, "draw_chunk", chunk, null, request, *encodings, returns=3)

    def _draw_again(self, missed: list[tuple[Chunk, Any]], progress: _Progress) -> None:
        """Have images drawn again that went down with their node before they were scored."""
        for chunk, images in missed:
            if chunk.id not in progress.drawn:
                continue  # it is being drawn again for another reward
            known = progress.drawn[chunk.id][1]
            if known == images:
                del progress.drawn[chunk.id]
                self._submit(chunk, progress.request)
            else:  # it has been drawn again meanwhile
                for scoring in self.scoring:
                    scoring.add(chunk, known)

    def _verify(self, info: DrawInfo, chunk: Chunk, request: DrawRequest) -> None:
        """Check that a chunk was drawn with exactly the levels, seeds, weights and conditions that were asked for."""
        keys = {text: self.conditions.key(text) for text in chunk.texts}
        perturbed = {text: self.conditions.perturbed_of(text).key for text in chunk.perturbed_texts}
        if info.fingerprint != fingerprint(chunk, request, keys, perturbed):
            raise RuntimeError(f"chunk {chunk.id} was not drawn as requested; sampler and driver versions differ")

    def redraw(self, drawn: list[DrawnChunk]) -> None:
        """Draw chunks again, in place: the same images and record in new objects. Scores stay."""
        for item in drawn:
            self._submit(item.chunk, item.request)
        places = {item.chunk.id: index for index, item in enumerate(drawn)}
        for done in stream(self.samplers):
            index, (images, record) = places[done.key], done.refs
            self._verify(done.value, drawn[index].chunk, drawn[index].request)
            drawn[index] = replace(drawn[index], info=done.value, images=images, record=record)

    def recover(
        self, drawn: list[DrawnChunk], ask: Callable[[], Any], prepare: Callable[[], None] | None = None
    ) -> Any:
        """Return what `ask` makes of drawn chunks. Where an object of theirs went down with its node, all chunks are
        drawn again, because Ray does not tell reliably which objects are lost; `prepare` runs before that."""
        for _ in range(MAX_OBJECT_LOSSES):
            try:
                return ask()
            except ObjectLostError as error:
                failure = error
                log.warning("objects went down with their node, and are drawn again: %s", reason(error))
                if prepare:
                    prepare()
                self.redraw(drawn)
        raise failure

    def images(self, drawn: list[DrawnChunk]) -> np.ndarray:
        """Return the images of drawn chunks, uint8 [N, H, W, 3]."""

        def ask() -> list[np.ndarray]:
            return fetch([item.images for item in drawn], self.config.cluster.timeout_s)

        return np.concatenate(self.recover(drawn, ask))
