"""Draws training steps in their order, up to `loop.ahead` of them beyond the one that the learner trains on."""

from contextlib import nullcontext

from align_cluster.config.run import RunConfig
from align_cluster.loop.clock import Clock
from align_cluster.loop.requests import plan_chunks, training_request
from align_cluster.loop.rollouts import Drawing, Rollout
from align_cluster.loop.workers import WorkerGroup
from align_cluster.types import Prompt


class StepDrawer:
    """Decides which weights draw which step, by the steps' numbers alone: a run is a function of its settings.

    Step n is drawn with the weights after n - `loop.ahead` steps, and trained on after n steps. While the learner
    trains on it, the samplers draw the next one. They finish a step before they switch weights, and go on with the next
    one before the last score of the one before is in.
    """

    def __init__(self, config: RunConfig, prompts: list[Prompt], workers: WorkerGroup, clock: Clock) -> None:
        self.config, self.prompts, self.workers, self.clock = config, prompts, workers, clock
        self.begun: dict[int, tuple[Drawing, dict[str, float]]] = {}

    def take(self, step: int) -> Rollout:
        """Return step number `step`, drawn and scored, when as many steps are done."""
        self._begin(step, 0)
        with self.clock.stage("rollout"):
            self.workers.rollouts.rest()
        for beyond in range(1, min(self.config.loop.ahead, self.config.steps - 1 - step) + 1):
            self._begin(step + beyond, beyond)
        drawing, explored = self.begun.pop(step)
        with self.clock.stage("reward"):
            rollout = self.workers.rollouts.collect(drawing)
        staleness = self.workers.weights.staleness(rollout.drawn[0].order.request.version)
        return Rollout(rollout.drawn, explored | rollout.metrics | {"staleness": float(staleness)})

    def _begin(self, step: int, beyond: int) -> None:
        """Have a step drawn, which is `beyond` the one that is trained next, unless that has begun."""
        if step in self.begun:
            return
        workers, chunks = self.workers, plan_chunks(self.config, self.prompts, step)
        prompts = [prompt for chunk in chunks for prompt in chunk.prompts]
        with self.clock.stage("encode"):
            workers.conditions.encode(prompts)
        with self.clock.stage("explore") if self.config.exploration else nullcontext():
            explored = workers.conditions.explore(prompts, step)
        version = workers.weights.behaviours[beyond].manifest.version
        with self.clock.stage("rollout"):  # the samplers may have to switch weights first
            drawing = workers.rollouts.begin(chunks, training_request(self.config, step, version))
        self.begun[step] = drawing, explored

    def drop(self) -> None:
        """Throw away what was drawn of coming steps, and draw them anew with the weights that are published next: the
        ones that drew it are given up."""
        for drawing, _ in self.begun.values():
            self.workers.rollouts.collect(drawing)
        self.begun.clear()
        self.workers.weights.forget()
