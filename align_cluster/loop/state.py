"""What a checkpoint holds: the whole state of a run after a step. It imports no Ray, so that others can read it too.

It is the state of the learner and of the advantage estimator, the weights that the next step is drawn with where they
are older, the counters of the loop, the times, and metrics.jsonl and evaluations.jsonl up to then. Prompts, seeds,
windows and perturbed conditions are functions of (seed, step), so the number of steps is the cursor of all of them.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align_cluster.checkpoint.store import Damaged, Store
from align_cluster.config.run import RunConfig
from align_cluster.files import save_tensors, write_text
from align_cluster.learner.state import Snapshot, under
from align_cluster.observe.rundir import RunDir

STATE, FACTS = "state.safetensors", "run.json"
TEXTS = ("metrics.jsonl", "evaluations.jsonl")  # the line files that a checkpoint brings back


@contextmanager
def reading() -> Iterator[None]:
    """Turn what a checkpoint of other content than ours raises into Damaged."""
    from safetensors import SafetensorError

    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        cause = getattr(error, "cause", None) or error  # an error of a learner rank comes with its whole trace
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
        raise Damaged(f"it is not the state of a run of this version ({reason})") from error


@dataclass(frozen=True)
class State:
    """Holds a run after `step` steps.

    `facts` are plain JSON, `credit` the arrays that the advantage estimator keeps, and `texts` returns the content of
    the run's line files by name. `behind` are the weights, by name, that the next step is drawn with where they are
    older than the learner's (`loop.ahead`).
    """

    step: int
    facts: dict[str, Any]
    learner: Snapshot
    credit: dict[str, np.ndarray] = field(default_factory=dict)
    texts: Callable[[], dict[str, bytes]] = dict
    behind: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def evaluated(self) -> bool:
        """Return whether the evaluation after this step is done or was not due."""
        return self.facts.get("evaluated", True)  # older checkpoints lack it, and were written after it

    def files(self) -> dict[str, bytes]:
        """Return the files of a checkpoint by name."""
        from safetensors.numpy import save

        tensors = {f"learner/{name}": value for name, value in self.learner.tensors().items()}
        tensors |= {f"credit/{name}": np.ascontiguousarray(value) for name, value in self.credit.items()}
        tensors |= {f"behind/{name}": np.ascontiguousarray(value) for name, value in self.behind.items()}
        facts = self.facts | {"step": self.step, "learner": self.learner.counts}
        return {STATE: save(tensors), FACTS: json.dumps(facts, indent=1).encode(), **self.texts()}

    @classmethod
    def of(cls, step: int, files: dict[str, bytes]) -> "State":
        """Read the files of a checkpoint. Raises Damaged where they are not those of a run."""
        from safetensors.numpy import load

        with reading():
            facts, tensors = json.loads(files[FACTS]), load(files[STATE])
            for name in ("config", "versions"):
                if not isinstance(facts[name], dict):
                    raise TypeError(f"{name} is no mapping")
            texts = {name: files[name] for name in TEXTS if name in files}
            for data in texts.values():
                data.decode()
            learner = Snapshot.of(facts["learner"], under("learner/", tensors))
            return cls(step, facts, learner, under("credit/", tensors), lambda: texts, under("behind/", tensors))


def store_of(config: RunConfig, run: RunDir) -> Store:
    """Return the place of a run's checkpoints: a folder in its directory, or one of its name under checkpoint.path."""
    path = config.checkpoint.path
    return Store(f"{path.rstrip('/')}/{run.path.resolve().name}" if path else str(run.checkpoints))


def write_critic(folder: Path, config: RunConfig, weights: dict[str, np.ndarray], credit: dict[str, Any]) -> None:
    """Write a critic's weights, and what its values mean; `credit` is the state of its advantage estimator."""
    save_tensors(folder / "critic.safetensors", {name: np.ascontiguousarray(w) for name, w in weights.items()}, {})
    facts = {"rewards": config.trained, "critic": config.algorithm.critic.model_dump(), **credit}
    write_text(folder / "critic.json", json.dumps(facts, indent=1))
