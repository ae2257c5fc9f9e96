"""The state of a run between two steps. It goes to disk every few steps, and stays in memory for the moment of an end.

What a checkpoint holds is in `state.py`.
"""

import json
from collections.abc import Callable
from types import TracebackType

from align_cluster.checkpoint.store import Damaged, Store
from align_cluster.checkpoint.writer import Job, Writer
from align_cluster.cluster.nodes import software
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.loop.advantages import AdvantageEstimator
from align_cluster.loop.clock import Clock
from align_cluster.loop.critic_advantages import CriticAdvantageEstimator
from align_cluster.loop.state import State, reading
from align_cluster.loop.summary import Results
from align_cluster.loop.workers import WorkerGroup
from align_cluster.observe.guards import Alarm, Guard
from align_cluster.observe.sinks import MetricWriter
from align_cluster.streams import VERSION


class CheckpointManager:
    """Saves a run, brings it back, and rolls it back.

    As a context manager it saves the last finished step, unless that is saved already, when an error, Ctrl-C or SIGTERM
    ends what runs inside.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        inputs: dict[str, str],
        workers: WorkerGroup,
        estimator: AdvantageEstimator | CriticAdvantageEstimator,
        clock: Clock,
        guard: Guard,
        note: Callable[[str], None],
    ) -> None:
        self.config, self.store, self.workers, self.estimator = config, store, workers, estimator
        self.clock, self.guard, self.note = clock, guard, note
        # What stays the same for the whole run. It is made once, because every step takes note of its state twice.
        self.constants = {
            "config": config.model_dump(mode="json"),
            "versions": software(),
            "streams": VERSION,
            "inputs": inputs,
        }
        self.rollbacks = self.resumed = 0
        self.writer = Writer(store, config.checkpoint, note)
        self.latest: State | None = None

    def restore(self, state: State) -> Results:
        """Bring all parts to where the run was; return what it had found until then."""
        try:
            with reading():
                return self._restore(state)
        except Damaged as error:
            raise UserError(
                f"--resume: step {state.step} cannot be restored: {error}; give another checkpoint"
            ) from error

    def _restore(self, state: State) -> Results:
        facts = state.facts
        self.workers.ranks.restore(state.learner)
        if self.config.loop.ahead and not state.behind:
            raise LookupError("it lacks the weights that the next step is drawn with")
        self.workers.weights.restore(facts["version"], state.behind)
        self.workers.rollouts.images_drawn = facts["images_drawn"]
        self.workers.lost_before = facts["workers_lost"]
        self.estimator.restore(facts["credit"], state.credit)
        self.clock.restore(facts["clock"])
        self.guard.restore(facts["guard"])
        self.rollbacks = facts["rollbacks"]
        self.resumed, self.writer.saved = facts["resumed"] + 1, state.step
        return Results(before=facts["before"], self_check=facts["self_check"])

    def roll_back(self, alarm: Alarm) -> None:
        """Bring the weights back to the last good checkpoint; the caller publishes them. Prompts and seeds go on.

        Raises UserError where there is no such checkpoint, or where the run has rolled back too often.
        """
        self.writer.wait()
        state = self.store.newest(self.note, lambda about: about.get("good", True), State.of)
        if state is None or self.rollbacks == self.config.guard.rollbacks:
            why = "no good checkpoint is there to roll back to" if state is None else f"{self.rollbacks} rollbacks done"
            raise UserError(f"{alarm.message}; stopped: {why}")
        self.note(f"rolled back to the weights after step {state.step}; prompts and seeds go on")
        self.workers.ranks.restore(state.learner)
        self.estimator.restore(state.facts["credit"], state.credit)
        self.guard.rolled_back()
        self.rollbacks += 1

    def step(self, step: int, metrics: MetricWriter, score: float | None, results: Results) -> None:
        """Take note that `step` steps are done and what is due after them, and save them if that is due."""
        self.finished(step, metrics, results, evaluated=True)
        settings = self.config.checkpoint
        best = settings.keep_best and score is not None
        if best or step == self.config.steps or (settings.every and step % settings.every == 0):
            self._save(score)

    def finished(self, step: int, metrics: MetricWriter, results: Results, evaluated: bool = False) -> None:
        """Take note that `step` steps are done: this is what is kept where the run is interrupted from now on.

        `evaluated` says that the evaluation after this step is done or not due; else a resumed run makes up for it.
        """
        facts = {
            **self.constants,
            "version": self.workers.weights.version,
            "images_drawn": self.workers.rollouts.images_drawn,
            "workers_lost": self.workers.lost,
            "credit": self.estimator.state(),
            "clock": self.clock.state(),
            "guard": self.guard.state(),
            "rollbacks": self.rollbacks,
            "resumed": self.resumed,
            "before": results.before,
            "self_check": results.self_check,
            "evaluated": evaluated,
        }
        facts = json.loads(json.dumps(facts))  # what is saved later must not change with the run
        learner, credit = self.workers.ranks.snapshot, self.estimator.arrays()
        self.latest = State(step, facts, learner, credit, metrics.mark(), self.workers.weights.behind())

    def _save(self, score: float | None = None) -> None:
        self.writer.save(Job(self.latest.step, self.latest.files, {"score": score, "good": self.guard.good}))

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.wait()
        if error is None:
            return
        if self.latest and self.writer.saved != self.latest.step:
            self._save()
            self.writer.wait()
        if self.writer.saved is None:
            self.note("not saved: no step was finished")
        else:
            self.note(f"saved after step {self.writer.saved}: the same command with --resume auto goes on from there")
