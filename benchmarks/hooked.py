"""Workers whose main calls can be overridden, for benchmarks and tests that disturb a run at chosen moments."""

from collections.abc import Sequence
from typing import Any

from align_cluster.learner.batching import Reduced
from align_cluster.loop.learning import Sync
from align_cluster.loop.rollouts import DrawnChunk, Rollout
from align_cluster.loop.workers import WorkerGroup
from align_cluster.rollouts.sampler import DrawRequest
from align_cluster.types import Chunk, Credit


class HookedWorkers(WorkerGroup):
    """Routes draw, update and publish of the run through methods of its own. `report` is one already."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._inner = (self.rollouts.draw, self.learner.update, self.weights.publish)
        self.rollouts.draw, self.learner.update, self.weights.publish = self.draw, self.update, self.publish

    def draw(self, chunks: Sequence[Chunk], request: DrawRequest) -> Rollout:
        """Draws and scores chunks, of a training step or (with a negative step) of an evaluation."""
        return self._inner[0](chunks, request)

    def update(self, step: int, drawn: list[DrawnChunk], credit: Credit) -> dict[str, Reduced]:
        """Trains one step."""
        return self._inner[1](step, drawn, credit)

    def publish(self, source: str) -> Sync:
        """Sends weights to the samplers."""
        return self._inner[2](source)
