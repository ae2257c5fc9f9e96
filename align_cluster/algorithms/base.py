"""The contract of an algorithm, and what the learner hands to it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch

from align_cluster.errors import UserError
from align_cluster.rollouts.steps import Step
from align_cluster.rollouts.windows import Window
from align_cluster.settings import Section
from align_cluster.types import Metric

# What several losses return: one name has one meaning.
KL = Metric("train/kl", "", "distance from the base model: KL a dimension; NFT: squared velocity gap")
REWARD = Metric(
    "train/reward", "score", "reward whose gradient the update followed: SRPO's relative one, both branches"
)
SATISFIED = Metric(
    "train/satisfied", "fraction", "share of samples at algorithm.margin or above, which have no gradient"
)


class Policy(Protocol):
    """The learner's network as an algorithm sees it: one base with named adapters, and the rollout's step kind."""

    step: Step

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, adapter: str | None = "default") -> torch.Tensor:
        """Network output fp32 like x under an adapter (None: the bare base), guided as the rollout was. Only the
        default adapter carries gradient."""

    def rewards(self, latents: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """For `direct` algorithms: weighted sums [b, J] of the trained rewards of the images of latents fp32
        [b, C, H, W], each under J texts, with a gradient to the latents."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: b members of one chunk, in the inner pass number `inner_pass` over them.

    advantages [b], or [b, K] where each step has its own; x0 [b, C, H, W]; sigmas [N + 1]; where recorded: indices
    [b, K], before, after, means [b, K, C, H, W] and log_probs [b, K]; `slots` are the recorded steps to train (left
    out: all). With a critic: returns (NaN where a reward does not judge the sample) and values before the update,
    [b, K, R].
    `generators` gives each member a fresh random stream for this (step, update, inner pass), whatever the world size.
    `prompt` is the members' text, `noises` are the seeds of their initial noises, `update` counts the run's optimiser
    updates so far.
    """

    inner_pass: int
    advantages: torch.Tensor
    x0: torch.Tensor
    sigmas: np.ndarray
    indices: torch.Tensor
    before: torch.Tensor | None
    after: torch.Tensor | None
    log_probs: torch.Tensor | None
    means: torch.Tensor | None
    generators: Callable[[str], list[torch.Generator]]
    slots: tuple[int, ...] | None = None
    returns: torch.Tensor | None = None
    values: torch.Tensor | None = None
    prompt: str = ""
    noises: tuple[int, ...] = ()
    update: int = 0

    def __post_init__(self) -> None:
        if self.slots is None:
            object.__setattr__(self, "slots", tuple(range(self.indices.shape[1])))


class Algorithm(ABC):
    """A loss over finished rollouts. Pure: state lives in the policy's adapters.

    `needs_density` asks for a step kind with log-probs, `needs_flow` for a network that predicts a velocity,
    `needs_path` for records of every denoising step. `direct` ones need no credit: the learner keeps the VAE and the
    trained rewards, whose gradients they follow. `offline` says whether real images can stand in for drawn ones.
    `default_step` names the step kind that flow models are drawn with, `behaviour` is the adapter that samplers draw
    with, `adapters` are the adapters that the learner keeps. `repeats_steps` says that the learner goes through
    recorded steps again. `metrics` declare what the loss returns: metric "kl" of a loss is declared as "train/kl".
    """

    Config: type[Section]
    needs_density: ClassVar[bool]
    needs_flow: ClassVar[bool] = False
    needs_path: ClassVar[bool] = False
    reward_gradient: ClassVar[bool] = False
    offline: ClassVar[bool] = False
    repeats_steps: ClassVar[bool] = False
    default_step: ClassVar[str]
    behaviour: ClassVar[str]
    adapters: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[Metric, ...]] = ()

    def __init__(self, config: Section) -> None:
        self.config = config

    @classmethod
    def step_for(cls, flow: bool) -> str:
        """Return the step kind that rollouts take by default; networks that predict epsilon or v have DDIM alone."""
        return cls.default_step if flow else "ddim" if cls.needs_density else "euler"

    def check_metrics(self, names: Iterable[str]) -> None:
        """Raise UserError where a loss returns a metric that the class does not declare, which no report could show."""
        declared = {metric.source for metric in self.metrics}
        for name in sorted(set(names) - declared):
            raise UserError(
                f"algorithm.kind {self.config.kind}: its loss returns the metric {name!r}, which "
                f'{type(self).__name__}.metrics does not declare; add Metric("train/{name}", unit, meaning) there'
            )

    @property
    def critic(self) -> Section | None:
        """Settings of the critic that is trained beside the policy; None: none is."""
        return None

    @property
    def needs_means(self) -> bool:
        """Whether rollouts must record the means of their densities as well."""
        return False

    def states(self, steps: int) -> Window | None:
        """Of which steps an N-step rollout without density must record where they began; None: of none."""
        return None

    @abstractmethod
    def inner_passes(self, steps: int, recorded: int) -> int:
        """Passes over each sample in one update, for N-step rollouts of which `recorded` steps are to be trained."""

    @abstractmethod
    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of each member [b], and detached metrics, each [b]."""

    def old_decay(self, updates: int) -> float | None:
        """Factor d of old <- d old + (1 - d) default after the step that ends at update number `updates`; None: no
        old."""
        return None
