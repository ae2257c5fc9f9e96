"""Drawing and scoring chunks. Tensors stay in the object store; the driver holds references."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ray.exceptions import ObjectLostError

from align_cluster.cluster.errors import reason
from align_cluster.cluster.learners import first_ready
from align_cluster.cluster.pool import Done, Pool, fetch, stream
from align_cluster.cluster.slots import InputLost
from align_cluster.config.plan import RewardPool
from align_cluster.config.run import RunConfig
from align_cluster.loop.conditions import ConditionStore, Texts
from align_cluster.loop.scoring import Scoring
from align_cluster.loop.syncing import WeightSync
from align_cluster.rewards.mix import beside, without
from align_cluster.rollouts.sampler import DrawRequest, fingerprint
from align_cluster.types import Chunk, ChunkId, DrawInfo, Scores

log = logging.getLogger(__name__)
MAX_OBJECT_LOSSES = 3  # lost objects tolerated in one step before the run ends: a node that keeps failing is no chance
Report = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass(frozen=True)
class Order:
    """Asks for one chunk, drawn as `request` says. Its `texts` are encoded."""

    chunk: Chunk
    request: DrawRequest
    texts: Texts

    @property
    def references(self) -> list[Any]:
        """Return references to the conditions of the chunk's texts and then to its perturbed ones, in their order."""
        return [stored.reference for stored in (*self.texts.conditions.values(), *self.texts.perturbed.values())]

    def verify(self, info: DrawInfo) -> None:
        """Check that the chunk was drawn with exactly the levels, seeds, weights and conditions that were asked for."""
        encodings = (self.texts.conditions, self.texts.perturbed)
        keys = ({text: stored.key for text, stored in one.items()} for one in encodings)
        if info.fingerprint != fingerprint(self.chunk, self.request, *keys):
            raise RuntimeError(f"chunk {self.chunk.id} was not drawn as requested; sampler and driver versions differ")


@dataclass(frozen=True)
class DrawnChunk:
    """Holds one chunk that was drawn as `order` asks and then scored; `images` and `record` are references.

    Rows that are not finite have no scores, whatever a reward says of their black images.
    """

    info: DrawInfo
    images: Any
    record: Any
    scores: Scores
    order: Order

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", without(self.scores, self.info.non_finite))

    @property
    def finite(self) -> np.ndarray:
        """Return which rows are finite, as bool [B]."""
        return ~np.isin(np.arange(len(self.chunk)), self.info.non_finite)

    @property
    def chunk(self) -> Chunk:
        """Return the chunk that was asked for."""
        return self.info.chunk


@dataclass(frozen=True)
class Rollout:
    """Holds the result of one draw: its chunks in the order they were asked for, and how scoring kept up as metrics."""

    drawn: list[DrawnChunk]
    metrics: dict[str, float]


class Drawing:
    """Keeps how far one draw has come: what was ordered, drawn, and scored by each pool of reward workers."""

    def __init__(self, orders: Sequence[Order], scoring: Sequence[Scoring]) -> None:
        self.orders = {order.chunk.id: order for order in orders}
        self.scoring = {one.pool: one for one in scoring}
        self.drawn: dict[ChunkId, tuple] = {}
        self.parts: dict[ChunkId, list[Scores]] = {key: [] for key in self.orders}
        self.scored = 0

    @property
    def training(self) -> bool:
        """Tell whether it is a training step, and no evaluation."""
        return next(iter(self.orders))[0] >= 0

    @property
    def finished(self) -> bool:
        """Tell whether every chunk is drawn and scored."""
        return len(self.drawn) == len(self.orders) and (self.scored == len(self.orders) or not self.scoring)


class RolloutCollector:
    """Has chunks drawn by the samplers and scored by the reward workers, each as soon as it is drawn.

    Several draws may be under way. The samplers take them one after the other, and change weights between them only:
    they finish what they have, then switch.
    """

    def __init__(
        self,
        config: RunConfig,
        samplers: Pool,
        rewards: Sequence[tuple[Pool, RewardPool]],
        conditions: ConditionStore,
        weights: WeightSync,
        report: Report,
    ) -> None:
        self.config, self.samplers, self.rewards = config, samplers, rewards
        self.conditions, self.weights, self.report = conditions, weights, report
        conditions.others = self._take
        self.images_drawn = 0
        self.waiting: deque[Order] = deque()
        self.drawings: list[Drawing] = []

    def draw(self, chunks: Sequence[Chunk], request: DrawRequest) -> Rollout:
        """Draw and score chunks, whose texts must be encoded."""
        return self.collect(self.begin(chunks, request))

    def begin(self, chunks: Sequence[Chunk], request: DrawRequest) -> Drawing:
        """Begin to draw chunks, whose texts must be encoded, after all that were begun before."""
        scoring = [Scoring(*pair) for pair in self.rewards]
        for one in scoring:
            one.begin(chunks)
        orders = [Order(chunk, request, self.conditions.texts(chunk, request.guidance)) for chunk in chunks]
        drawing = self._begin(orders, scoring)
        self._show_drawn(drawing)
        self._show_scored(drawing)
        return drawing

    def _begin(self, orders: Sequence[Order], scoring: Sequence[Scoring]) -> Drawing:
        drawing = Drawing(orders, scoring)
        self.drawings.append(drawing)
        self.waiting.extend(orders)
        self._feed()
        return drawing

    def _feed(self) -> None:
        """Hand out what waits. Where that takes other weights, the samplers first finish all that they have."""
        while self.waiting and (self.waiting[0].request.version == self.weights.held or not self.samplers.busy):
            order = self.waiting.popleft()
            self.weights.hold(order.request.version)
            arguments = (order.chunk, order.texts.null, order.request, *order.references)
            self.samplers.submit(order.chunk.id, "draw_chunk", *arguments, returns=3)
        if self.samplers.waiting:
            self.samplers.grow()
        for drawing in self.drawings:  # a worker has room for any draw, whoever's call has ended
            for scoring in drawing.scoring.values():
                scoring.feed()

    def rest(self) -> None:
        """Wait until the samplers have drawn all that was begun. Scoring may go on."""
        self._run(lambda: not (self.waiting or self.samplers.busy))

    def collect(self, drawing: Drawing) -> Rollout:
        """Wait until a draw is scored, and return it."""
        self._run(lambda: drawing.finished)
        metrics = {name: value for one in drawing.scoring.values() for name, value in one.end().items()}
        if len(drawing.orders) >= len(self.samplers.workers):  # fewer chunks do not tell how many samplers are needed
            self.samplers.trim()
        self.drawings.remove(drawing)
        self.images_drawn += sum(len(order.chunk) for order in drawing.orders.values())
        names = list(self.config.rewards)
        found = [
            DrawnChunk(*drawing.drawn[key], beside(drawing.parts[key], names), order)
            for key, order in drawing.orders.items()
        ]
        for other in self.drawings[:1]:
            self._show_scored(other)
        return Rollout(found, metrics)

    def _run(self, until: Callable[[], bool]) -> None:
        """Draw and score until something holds."""
        for done in stream(self.samplers, *(pool for pool, _ in self.rewards), until=until):
            self._take(done)

    def wait_beside(self, refs: list[Any], seconds: float) -> list[Any]:
        """Return the first ready one of references to others' work, in a list, and draw and score until it is there."""
        if self.drawings:
            for done in stream(self.samplers, *(pool for pool, _ in self.rewards), beside=refs, seconds=seconds):
                self._take(done)
            seconds = 0
        return first_ready(refs, seconds)

    def _take(self, done: Done) -> None:
        """Take in the end of one call, and go on with what waits for it."""
        key = done.key if done.pool is self.samplers else done.key.parts[0].chunk.id
        drawing = next((one for one in self.drawings if key in one.orders), None)
        if drawing is None:
            return  # a late answer about images that were drawn again meanwhile, and scored
        if isinstance(done.value, InputLost):
            self._draw_again(drawing.scoring[done.pool].withdraw(done), drawing)
        elif done.pool is self.samplers:
            drawing.orders[key].verify(done.value)
            drawing.drawn[key] = (done.value, *done.refs)
            for scoring in drawing.scoring.values():
                scoring.add(drawing.orders[key].chunk, done.refs[0])
            self._show_drawn(drawing)
        else:
            for chunk, scores in drawing.scoring[done.pool].collect(done).items():
                drawing.parts[chunk].append(scores)
                drawing.scored += len(drawing.parts[chunk]) == len(drawing.scoring)
            self._show_scored(drawing)
        self._feed()

    def _show_drawn(self, drawing: Drawing) -> None:
        """Report how many chunks of a training step are drawn; people see an evaluation as one stage."""
        if drawing.training and drawing.scoring:
            self.report("rollout", len(drawing.drawn), len(drawing.orders))

    def _show_scored(self, drawing: Drawing) -> None:
        """Report how many chunks are scored; of training steps, of the first that is under way."""
        if not drawing.training or drawing is self.drawings[0]:
            self.report("reward" if drawing.training else "evaluate", drawing.scored, len(drawing.orders))

    def _draw_again(self, missed: list[tuple[Chunk, Any]], drawing: Drawing) -> None:
        """Have images drawn again that went down with their node before they were scored."""
        for chunk, images in missed:
            if chunk.id not in drawing.drawn:
                continue  # it is being drawn again for another reward
            known = drawing.drawn[chunk.id][1]
            if known == images:
                del drawing.drawn[chunk.id]
                self.waiting.append(drawing.orders[chunk.id])
            else:  # it has been drawn again meanwhile
                for scoring in drawing.scoring.values():
                    scoring.add(chunk, known)

    def redraw(self, drawn: list[DrawnChunk]) -> None:
        """Draw chunks again, in place: the same images and record in new objects. Scores stay."""
        drawing = self._begin([item.order for item in drawn], [])
        self._run(lambda: drawing.finished)
        self.drawings.remove(drawing)
        for index, item in enumerate(drawn):
            info, images, record = drawing.drawn[item.chunk.id]
            drawn[index] = replace(item, info=info, images=images, record=record)

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
