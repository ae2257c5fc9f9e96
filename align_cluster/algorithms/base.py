"""The contract of an algorithm, and what the learner passes to it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
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
    """The learner's network as an algorithm sees it: one base with named adapters, and the rollout's kind of step."""

    step: Step

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, adapter: str | None = "default") -> torch.Tensor:
        """Return the network's output, fp32 like x, under an adapter (None: the bare base), guided as in the rollout.

        Only the default adapter carries gradient.
        """

    def follows(self, adapter: str) -> bool:
        """Return whether an adapter has the default one's weights, so that its prediction is the policy's own."""
        return False

    def rewards(self, latents: torch.Tensor, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return weighted sums [b, J] of the trained rewards, for algorithms that follow the gradient of rewards.

        Each image of the latents fp32 [b, C, H, W] is judged under J texts of its own, with a gradient to the latents.
        """


@dataclass(frozen=True, kw_only=True)
class RecordedSteps:
    """Holds what a rollout recorded of K denoising steps of each of b samples.

    `indices` [b, K] number the steps; `before` [b, K, C, H, W] are the latents that they started from. Where the step
    kind has a density: `after` [b, K, C, H, W] are the latents that they drew, `log_probs` [b, K] their log-densities,
    and `means` [b, K, C, H, W] the densities' means if the algorithm needs them. `slots` are the recorded steps to
    train (left out: all); a whole path holds others too.
    """

    indices: torch.Tensor
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    means: torch.Tensor | None = None
    slots: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.slots is None:
            object.__setattr__(self, "slots", tuple(range(self.indices.shape[1])))


class Streams(Protocol):
    """Gives random streams to the visits of a batch."""

    def __call__(self, purpose: str, *, shared: bool = False) -> list[torch.Generator]:
        """Return one stream a visit for this purpose; with `shared`, a sample's visits have equal streams."""


@dataclass(frozen=True)
class CriticTargets:
    """Holds what a critic learns from: `returns` (NaN where a reward does not judge the sample) and the `values` before
    the update, both [b, K, R]."""

    returns: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Holds b visits of samples of one chunk: each sample of a micro-batch, in one or more inner passes of an update.

    `passes` has the number of the inner pass of each visit; it is the same for all where log-probs are compared.
    `update` counts the run's optimiser updates so far. `advantages` are [b], or [b, K] where each step has its own;
    `x0` [b, C, H, W] are final latents and `sigmas` [N + 1] the rollout's noise levels. `prompts` are the texts of the
    samples and `noises` the seeds of their initial noises. `generators` gives each visit a fresh random stream for this
    (step, update) and a purpose, whatever the world size: one for each inner pass, or with `shared` the same in all.
    """

    passes: tuple[int, ...]
    advantages: torch.Tensor
    x0: torch.Tensor
    sigmas: np.ndarray
    recorded: RecordedSteps
    generators: Streams
    critic: CriticTargets | None = None
    prompts: tuple[str, ...] = ()
    noises: tuple[int, ...] = ()
    update: int = 0

    @property
    def inner_pass(self) -> int:
        """Return the one inner pass of all visits, for algorithms that do not fold. Raises ValueError where there are
        several."""
        (number,) = set(self.passes)
        return number


class Algorithm(ABC):
    """Computes a loss over finished rollouts. It is pure: the state lives in the policy's adapters.

    needs_density     the rollout's kind of step must have log-probs. They depend on the batch in their last bits, so a
                      learner's batch is then a rollout's, and one forward pass never holds several inner passes
    needs_flow        the network must predict a velocity
    needs_path        rollouts must record every denoising step
    reward_gradient   the learner keeps the VAE and the trained rewards and follows their gradients; advantages are not
                      assigned
    offline           real images can replace drawn ones
    default_step      the kind of step that flow models are drawn with
    behaviour         the adapter that samplers draw with
    adapters          the adapters that the learner keeps
    repeats_steps     the learner goes through recorded steps again
    metrics           what the loss returns: metric "kl" of a loss is declared as "train/kl"
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
        """Return the settings of the critic that trains beside the policy, or None."""
        return None

    @property
    def needs_means(self) -> bool:
        """Return whether rollouts must record the means of their densities as well."""
        return False

    def states(self, steps: int) -> Window | None:
        """Return the steps of an N-step rollout without density that must record their start, or None for no steps."""
        return None

    @abstractmethod
    def inner_passes(self, steps: int, recorded: int) -> int:
        """Return the passes over each sample in one update, for N-step rollouts with `recorded` steps to train."""

    @abstractmethod
    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of each member [b], and detached metrics, each [b]."""

    def old_decay(self, updates: int) -> float | None:
        """Return the factor d of old <- d old + (1 - d) default, applied after the step that ends at update `updates`.

        None means that the algorithm has no adapter "old".
        """
        return None
