"""The contract of an algorithm, and what the learner hands to it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch

from align_cluster.rollouts.steps import Step
from align_cluster.rollouts.windows import Window
from align_cluster.settings import Section


class Policy(Protocol):
    """The learner's network as an algorithm sees it: one base with named adapters, and the rollout's step kind."""

    step: Step

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, adapter: str | None = "default") -> torch.Tensor:
        """Network output fp32 like x under an adapter (None: the bare base), guided as the rollout was. Only the
        default adapter carries gradient."""

    def rewards(self, latents: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """For `direct` algorithms: weighted sums [b, J] of the trained rewards of the images of latents fp32
        [b, C, H, W], each under J texts, with a gradient to the latents."""


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


@dataclass(frozen=True)
class CriticTargets:
    """Holds what a critic learns from: `returns` (NaN where a reward does not judge the sample) and the `values` before
    the update, both [b, K, R]."""

    returns: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Holds one micro-batch, b members of one chunk, in inner pass number `inner_pass` of an update.

    `update` counts the run's optimiser updates so far. `advantages` are [b], or [b, K] where each step has its own;
    `x0` [b, C, H, W] are final latents and `sigmas` [N + 1] the rollout's noise levels. `prompt` is the members' text
    and `noises` are the seeds of their initial noises. `generators` gives each member a fresh random stream for this
    (step, update, inner pass) and a purpose, whatever the world size.
    """

    inner_pass: int
    advantages: torch.Tensor
    x0: torch.Tensor
    sigmas: np.ndarray
    recorded: RecordedSteps
    generators: Callable[[str], list[torch.Generator]]
    critic: CriticTargets | None = None
    prompt: str = ""
    noises: tuple[int, ...] = ()
    update: int = 0


class Algorithm(ABC):
    """A loss over finished rollouts. Pure: state lives in the policy's adapters.

    `needs_density` asks for a step kind with log-probs, `needs_flow` for a network that predicts a velocity,
    `needs_path` for records of every denoising step. `direct` ones need no credit: the learner keeps the VAE and the
    trained rewards, whose gradients they follow. `offline` says whether real images can stand in for drawn ones.
    `default_step` names the step kind that flow models are drawn with, `behaviour` is the adapter that samplers draw
    with, `adapters` are the adapters that the learner keeps.
    """

    Config: type[Section]
    needs_density: ClassVar[bool]
    needs_flow: ClassVar[bool] = False
    needs_path: ClassVar[bool] = False
    reward_gradient: ClassVar[bool] = False
    offline: ClassVar[bool] = False
    default_step: ClassVar[str]
    behaviour: ClassVar[str]
    adapters: ClassVar[tuple[str, ...]]

    def __init__(self, config: Section) -> None:
        self.config = config

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
