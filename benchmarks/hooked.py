"""Workers whose main calls can be overridden, for benchmarks and tests that disturb a run at chosen moments."""

from collections.abc import Sequence
from typing import Any

from align_cluster.learner.batching import Reduced
from align_cluster.loop.rollouts import Drawing, DrawnChunk, Rollout
from align_cluster.loop.syncing import Sync
from align_cluster.loop.workers import WorkerGroup
from align_cluster.rollouts.sampler import DrawRequest
from align_cluster.types import Chunk, Credit


class HookedWorkers(WorkerGroup):
    """Routes begin, collect, update and publish of the run through methods of its own. `report` is one already."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        rollouts, learner, weights = self.rollouts, self.learner, self.weights
        self._inner = (rollouts.begin, rollouts.collect, learner.update, weights.publish)
        rollouts.begin, rollouts.collect, learner.update, weights.publish = (
            self.begin,
            self.collect,
            self.update,
            self.publish,
        )

    def begin(self, chunks: Sequence[Chunk], request: DrawRequest) -> Drawing:
        """Begins to draw and score chunks, of a training step or (with a negative step) of an evaluation."""
        return self._inner[0](chunks, request)

    def collect(self, drawing: Drawing) -> Rollout:
        """Waits until a draw is scored."""
        return self._inner[1](drawing)

    def update(self, step: int, drawn: list[DrawnChunk], credit: Credit) -> dict[str, Reduced]:
        """Trains one step."""
        return self._inner[2](step, drawn, credit)

    def publish(self, source: str) -> Sync:
        """Publishes weights, and sends them to samplers that have nothing to draw."""
        return self._inner[3](source)
