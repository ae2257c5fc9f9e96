"""A guard watches a run's numbers for collapse: rules on rewards, gradients, groups and images, and what to do then.

A rollback takes weights, moments and statistics of the last good checkpoint and goes on with the prompts that come
next, as PaLM's authors did (arXiv 2204.02311, section 5.1): the same prompts again would end in the same place.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from align_cluster.errors import UserError
from align_cluster.rewards.base import RewardSection
from align_cluster.settings import Section
from align_cluster.types import Failure

WINDOW = 20  # earlier steps whose median a gradient norm is compared with
SMOOTH = 5  # steps whose mean is one value of a reward, since a single step is noisy
ACTIONS = ("warn", "rollback", "stop")  # from mild to strict

Action = Literal["warn", "rollback", "stop"]


class Rule(Section):
    """Takes `action` when a value is at or above `limit` for `patience` steps in a row; `below`: when it is under it.

    The alarm's sentence quotes the docstring of a rule, which says what the rule watches.
    """

    below: ClassVar[bool] = False
    limit: PositiveFloat
    """The value that breaks the rule."""
    patience: PositiveInt = 3
    """The number of training steps in a row that must break the rule before anything happens."""
    action: Action = "warn"
    """What happens then. `warn` writes to the log, `rollback` takes the weights of the last good checkpoint and goes on
    with the prompts that come next, and `stop` ends the run."""


class NotFinite(Rule):
    """Watches the updates of a step that did nothing because loss, gradient or all samples were not finite."""

    limit: PositiveFloat = 1
    """The number of skipped updates in one step that breaks the rule."""
    patience: PositiveInt = 5
    action: Action = "stop"


class RewardDrop(Rule):
    """Watches how far a trained reward fell below its best, as means of 5 steps, in deviations of the first step."""

    limit: PositiveFloat = 1.5
    """The fall below the best value that breaks the rule, in standard deviations of the reward over the images of the
    first step."""


class GradNorm(Rule):
    """Watches the gradient norm over the median of the last 20 steps."""

    limit: PositiveFloat = 30
    """The gradient norm that breaks the rule, as a multiple of the median of the last 20 steps."""


class ZeroStd(Rule):
    """Watches the share of groups whose images all score the same, so that they teach nothing."""

    limit: PositiveFloat = 0.95
    """The share of groups with equal rewards that breaks the rule, from 0 to 1."""
    patience: PositiveInt = 5


class Contrast(Rule):
    """Watches the contrast of the images over that of the first step: images may turn grey, black or white."""

    below: ClassVar[bool] = True
    limit: PositiveFloat = 0.3
    """The contrast below which the rule is broken, as a share of that of the first step."""


class Diversity(Rule):
    """Watches how much a group's images differ, over the first step's: images may turn into copies of each other."""

    below: ClassVar[bool] = True
    limit: PositiveFloat = 0.1
    """The diversity below which the rule is broken, as a share of that of the first step."""


class GuardConfig(Section):
    """Says when a run counts as collapsing. Null switches a rule off."""

    not_finite: NotFinite | None = NotFinite()
    """Watches for updates that were skipped because a loss or gradient was not finite."""
    reward_drop: RewardDrop | None = RewardDrop()
    """Watches for a trained reward that falls far below its best."""
    grad_norm: GradNorm | None = GradNorm()
    """Watches for gradients that are far larger than before."""
    zero_std: ZeroStd | None = ZeroStd()
    """Watches for groups whose images all score the same, which teach nothing."""
    contrast: Contrast | None = Contrast()
    """Watches for images that turn grey, black or white."""
    diversity: Diversity | None = Diversity()
    """Watches for images of one prompt that turn into copies of each other."""
    rollbacks: PositiveInt = 3
    """The number of rollbacks that a run may make. The next one stops it instead."""


def no_score(name: str, failure: Failure, when: str) -> str:
    """Say in a sentence that a trained reward has failed on all images, and what to do."""
    said = " ".join(failure.message.split())[:500]
    return (
        f"rewards.{name} has no score for any image {when} ({failure.kind}: {said}); mend what it says, or "
        f"set rewards.{name}.on_failure.stop_after to null to go on without these scores"
    )


@dataclass(frozen=True)
class Alarm:
    """Says in a sentence which rule a run broke, and which action the rule asks for."""

    rule: str
    action: Action
    message: str


class Guard:
    """Sees the metrics of every step and raises an alarm where a rule is broken. All its state is in `state`."""

    def __init__(self, config: GuardConfig, rewards: list[str]) -> None:
        """Watch by the rules of `config`; `rewards` are the names of the trained rewards."""
        self.config, self.rewards = config, rewards
        self.streaks: dict[str, int] = {}
        self.first: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.recent: dict[str, list[float]] = {name: [] for name in rewards}

    @property
    def rules(self) -> list[str]:
        """Return the names of the rules that are on."""
        return [name for name, rule in self.config if isinstance(rule, Rule)]

    @property
    def good(self) -> bool:
        """True if the last step broke no rule."""
        return not any(self.streaks.values())

    def watch(self, step: int, values: dict[str, float]) -> Alarm | None:
        """Take in the metrics of one step and return the strictest alarm that they raise, or None."""
        alarms = []
        for name, value in self._measure(values).items():
            rule: Rule | None = getattr(self.config, name)
            if rule is None:
                continue
            broken = value < rule.limit if rule.below else value >= rule.limit
            self.streaks[name] = self.streaks.get(name, 0) + 1 if broken else 0
            if self.streaks[name] == rule.patience:
                side = "below" if rule.below else "at or above"
                about = rule.__doc__[0].lower() + rule.__doc__[1:].rstrip(".")
                message = (
                    f"step {step}: {name} is {value:.3g}, for {rule.patience} steps {side} guard.{name}.limit "
                    f"{rule.limit:g} ({about})"
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

    def require_scores(self, step: int, failures: Mapping[str, Failure], rewards: Mapping[str, RewardSection]) -> None:
        """Take in which trained rewards scored no image of a step because all failed; see `mix.silent`.

        Raises UserError with the reward's own error where one did so for `on_failure.stop_after` steps in a row.
        """
        for name in self.rewards:
            key, most = f"unscored/{name}", rewards[name].on_failure.stop_after
            self.streaks[key] = self.streaks.get(key, 0) + 1 if name in failures else 0
            if most and self.streaks[key] >= most:
                raise UserError(f"step {step}: {no_score(name, failures[name], f'in {most} steps in a row')}")

    def _measure(self, values: dict[str, float]) -> dict[str, float]:
        """Return what each rule compares with its limit; a rule without a value in this step is absent."""
        found = {"not_finite": values.get("train/skipped", 0.0), "zero_std": values.get("group/zero_std_ratio", 0.0)}
        if values.get("rollout/non_finite"):
            found["not_finite"] += values.get("train/empty", 0.0)
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
        """Return how far the reward `name` is below its best, in deviations of the first step's images."""
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
        """Forget what was seen of the weights that a rollback took back."""
        self.streaks = {}
        self.recent = {name: [] for name in self.rewards}
        self.norms.clear()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"streaks": self.streaks, "first": self.first, "best": self.best} | {
            "norms": list(self.norms),
            "recent": self.recent,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()` of an earlier run."""
        self.streaks, self.first, self.best = (dict(state[name]) for name in ("streaks", "first", "best"))
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.recent = {name: list(state["recent"].get(name, [])) for name in self.rewards}
