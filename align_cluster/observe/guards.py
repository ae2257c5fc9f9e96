"""Watches a run's numbers for collapse: rules on rewards, gradients, groups and images, each with what to do then.

Rolling back takes weights, moments and statistics of the last good checkpoint and goes on with the prompts that come
next, as PaLM's authors did (arXiv 2204.02311, section 5.1): the same prompts again would end in the same place.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from align_cluster.errors import UserError
from align_cluster.settings import Section

WINDOW = 20  # steps that a gradient norm is compared with
SMOOTH = 5  # steps whose mean reward is one value
ACTIONS = ("warn", "rollback", "stop")  # from mild to strict

Action = Literal["warn", "rollback", "stop"]


class Rule(Section):
    """`action` is taken where a value is at or above `limit` (`below`: under it) for `patience` steps in a row."""

    below: ClassVar[bool] = False
    limit: PositiveFloat
    patience: PositiveInt = 3
    action: Action = "warn"


class NotFinite(Rule):
    """updates of a step that were skipped because loss or gradient was not finite"""

    limit: PositiveFloat = 1
    patience: PositiveInt = 5
    action: Action = "stop"


class RewardDrop(Rule):
    """fall of a trained reward below its best, means of 5 steps, in deviations of the first step's images"""

    limit: PositiveFloat = 1.5


class GradNorm(Rule):
    """gradient norm over the median of the last 20 steps"""

    limit: PositiveFloat = 30


class ZeroStd(Rule):
    """share of groups whose images all score the same, so that they teach nothing"""

    limit: PositiveFloat = 0.95
    patience: PositiveInt = 5


class Contrast(Rule):
    """contrast of the images over that of the first step: they turn grey, black or white"""

    below: ClassVar[bool] = True
    limit: PositiveFloat = 0.3


class Diversity(Rule):
    """difference between images of a group over that of the first step: they turn into copies"""

    below: ClassVar[bool] = True
    limit: PositiveFloat = 0.1


class GuardConfig(Section):
    """When a run is thought to collapse; null switches a rule off. After so many `rollbacks` the run stops."""

    not_finite: NotFinite | None = NotFinite()
    reward_drop: RewardDrop | None = RewardDrop()
    grad_norm: GradNorm | None = GradNorm()
    zero_std: ZeroStd | None = ZeroStd()
    contrast: Contrast | None = Contrast()
    diversity: Diversity | None = Diversity()
    rollbacks: PositiveInt = 3


@dataclass(frozen=True)
class Alarm:
    """A rule that a run broke, in a sentence, and what is to be done."""

    rule: str
    action: Action
    message: str


class Guard:
    """Sees every step's metrics. All its state is in `state`."""

    def __init__(self, config: GuardConfig, rewards: list[str]) -> None:
        self.config, self.rewards = config, rewards
        self.streaks: dict[str, int] = {}
        self.first: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.recent: dict[str, list[float]] = {name: [] for name in rewards}

    @property
    def good(self) -> bool:
        """Whether the last step broke no rule."""
        return not any(self.streaks.values())

    def watch(self, step: int, values: dict[str, float]) -> Alarm | None:
        """Take in the metrics of one step; the strictest alarm that it raises."""
        alarms = []
        for name, value in self._measure(values).items():
            rule: Rule | None = getattr(self.config, name)
            if rule is None:
                continue
            broken = value < rule.limit if rule.below else value >= rule.limit
            self.streaks[name] = self.streaks.get(name, 0) + 1 if broken else 0
            if self.streaks[name] == rule.patience:
                side = "below" if rule.below else "at or above"
                message = (
                    f"step {step}: {name} is {value:.3g}, for {rule.patience} steps {side} guard.{name}.limit "
                    f"{rule.limit:g} ({rule.__doc__})"
                )
                alarms.append(Alarm(name, rule.action, message))
        return max(alarms, key=lambda alarm: ACTIONS.index(alarm.action), default=None)

    def rollback_wanted(self, step: int, values: dict[str, float], note: Callable[[str], None]) -> Alarm | None:
        """Watches one step and acts on its alarm: notes a warning, returns an alarm that asks for a rollback.

        Raises UserError where a rule says stop.
        """
        alarm = self.watch(step, values)
        if alarm is None:
            return None
        if alarm.action == "stop":
            raise UserError(f"{alarm.message}; stopped, as guard.{alarm.rule}.action says")
        note(alarm.message)
        return alarm if alarm.action == "rollback" else None

    def _measure(self, values: dict[str, float]) -> dict[str, float]:
        found = {"not_finite": values.get("train/skipped", 0.0), "zero_std": values.get("group/zero_std_ratio", 0.0)}
        norm = values.get("train/grad_norm")
        if norm is not None:
            if len(self.norms) >= SMOOTH and median(self.norms) > 0:
                found["grad_norm"] = norm / median(self.norms)
            self.norms.append(norm)
        for name in ("contrast", "diversity"):
            value = values.get(f"images/{name}")
            if value is not None:
                first = self.first.setdefault(name, value)
                found[name] = value / first if first else 1.0
        drops = [self._drop(name, values) for name in self.rewards]
        return found | {"reward_drop": max(drops, default=0.0)}

    def _drop(self, name: str, values: dict[str, float]) -> float:
        mean, spread = (values.get(f"reward/{name}/{kind}") for kind in ("mean", "std"))
        if mean is None:
            return 0.0
        scale = self.first.setdefault(f"{name}/std", spread) or 1.0
        self.recent[name] = [*self.recent[name], mean][-SMOOTH:]
        if len(self.recent[name]) < SMOOTH:
            return 0.0
        smooth = sum(self.recent[name]) / SMOOTH
        self.best[name] = max(self.best.get(name, smooth), smooth)
        return (self.best[name] - smooth) / scale

    def rolled_back(self) -> None:
        """The weights are earlier ones: what was seen of later ones counts no more."""
        self.streaks = {}
        self.recent = {name: [] for name in self.rewards}
        self.norms.clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"streaks": self.streaks, "first": self.first, "best": self.best} | {
            "norms": list(self.norms),
            "recent": self.recent,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()` of an earlier run."""
        self.streaks, self.first, self.best = (dict(state[name]) for name in ("streaks", "first", "best"))
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.recent = {name: list(state["recent"].get(name, [])) for name in self.rewards}
