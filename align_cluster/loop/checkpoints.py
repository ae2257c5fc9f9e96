"""What a run is between two steps: kept on disk every few steps, and in memory for the moment in which it is ended.

A checkpoint holds the learner's whole state, credit's, the counters of the loop, the times, and metrics.jsonl and
evaluations.jsonl up to then. Prompts, seeds, windows and perturbed conditions are functions of (seed, step), so the
number of steps is the cursor of all of them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from align_cluster.checkpoint.store import Store
from align_cluster.checkpoint.writer import Job, Writer
from align_cluster.cluster.nodes import software
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.learner.state import Snapshot, under
from align_cluster.loop.advantages import Creditor
from align_cluster.loop.clock import Clock
from align_cluster.loop.critic_advantages import CriticCreditor
from align_cluster.loop.workers import Crew
from align_cluster.observe.guards import Guard
from align_cluster.observe.sinks import MetricWriter

STATE, FACTS = "state.safetensors", "run.json"


@dataclass(frozen=True)
class State:
    """A run after `step` steps. `facts` are plain JSON; `credit` are arrays that credit keeps; `texts` gives the
    content of the run's line files by name."""

    step: int
    facts: dict[str, Any]
    learner: Snapshot
    credit: dict[str, np.ndarray] = field(default_factory=dict)
    texts: Callable[[], dict[str, bytes]] = dict

    def files(self) -> dict[str, bytes]:
        """What a checkpoint of it consists of."""
        from safetensors.numpy import save

        tensors = {f"learner/{name}": value for name, value in self.learner.tensors().items()}
        tensors |= {f"credit/{name}": np.ascontiguousarray(value) for name, value in self.credit.items()}
        facts = self.facts | {"step": self.step, "learner": self.learner.counts}
        return {STATE: save(tensors), FACTS: json.dumps(facts, indent=1).encode(), **self.texts()}

    @classmethod
    def of(cls, step: int, files: dict[str, bytes]) -> "State":
        from safetensors.numpy import load

        facts, tensors = json.loads(files[FACTS]), load(files[STATE])
        texts = {name: data for name, data in files.items() if name.endswith(".jsonl")}
        return cls(
            step,
            facts,
            Snapshot.of(facts["learner"], under("learner/", tensors)),
            under("credit/", tensors),
            lambda: texts,
        )


class Keeper:
    """Saves a run and brings it back. As a context manager it saves the last finished step, if it has not yet, when an
    error, Ctrl-C or SIGTERM ends what runs inside."""

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        crew: Crew,
        creditor: Creditor | CriticCreditor,
        clock: Clock,
        note: Callable[[str], None],
    ) -> None:
        self.config, self.store, self.crew, self.creditor, self.clock = config, store, crew, creditor, clock
        self.note, self.guard = note, Guard(config.guard, config.trained)
        self.rollbacks = self.resumed = 0
        self.writer = Writer(store, config.checkpoint, note)
        self.latest: State | None = None

    def restore(self, state: State) -> tuple[dict, dict | None]:
        """Bring workers, credit and clock to where the run was; the base model's scores and the self-check of then."""
        facts = state.facts
        self.crew.learners.restore(state.learner)
        # The version that the samplers had is published anew.
        self.crew.version, self.crew.images_drawn = facts["version"] - 1, facts["images_drawn"]
        self.crew.lost_before = facts["workers_lost"]
        self.creditor.restore(facts["credit"], state.credit)
        self.clock.restore(facts["clock"])
        self.guard.restore(facts["guard"])
        self.rollbacks = facts["rollbacks"]
        self.resumed, self.writer.saved = facts["resumed"] + 1, state.step
        return facts["before"], facts["self_check"]

    def roll_back_if_needed(self, step: int, values: dict[str, float]) -> bool:
        """Look for collapse after a step; whether the run was rolled back, so that samplers need its weights.

        UserError where a rule says stop, or no rollback is left.
        """
        alarm = self.guard.watch(step, values)
        if alarm is None:
            return False
        if alarm.action == "stop":
            raise UserError(f"{alarm.message}; stopped, as guard.{alarm.rule}.action says")
        self.note(alarm.message)
        if alarm.action == "warn":
            return False
        self.writer.wait()
        found = self.store.newest(self.note, lambda about: about["good"])
        if found is None or self.rollbacks == self.config.guard.rollbacks:
            why = "no good checkpoint is there to roll back to" if found is None else f"{self.rollbacks} rollbacks done"
            raise UserError(f"{alarm.message}; stopped: {why}")
        state = State.of(*found)
        self.note(f"rolled back to the weights after step {state.step}; prompts and seeds go on")
        self.crew.learners.restore(state.learner)
        self.creditor.restore(state.facts["credit"], state.credit)
        self.guard.rolled_back()
        self.rollbacks += 1
        return True

    def step(
        self, step: int, metrics: MetricWriter, score: float | None, before: dict, self_check: dict | None
    ) -> None:
        """`step` steps are done. Saves them if that is due, with the scores of the base model and the self-check."""
        facts = {
            "config": self.config.model_dump(mode="json"),
            "versions": software(),
            "version": self.crew.version,
            "images_drawn": self.crew.images_drawn,
            "workers_lost": self.crew.workers_lost,
            "credit": self.creditor.state(),
            "clock": self.clock.state(),
            "guard": self.guard.state(),
            "rollbacks": self.rollbacks,
            "resumed": self.resumed,
            "before": before,
            "self_check": self_check,
        }
        facts = json.loads(json.dumps(facts))  # what is saved later must not change with the run
        self.latest = State(step, facts, self.crew.learners.snapshot, self.creditor.arrays(), metrics.mark())
        settings = self.config.checkpoint
        best = settings.keep_best and score is not None
        if best or step == self.config.steps or (settings.every and step % settings.every == 0):
            self._save(score)

    def _save(self, score: float | None = None) -> None:
        self.writer.save(Job(self.latest.step, self.latest.files, {"score": score, "good": self.guard.good}))

    def __enter__(self) -> "Keeper":
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
