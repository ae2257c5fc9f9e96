"""Latent actor-critic PPO ("Explicit Critic Guidance", arXiv 2605.27736).

A critic on noisy latents gives each denoising step its own credit, so groups are not needed: one image a prompt is
enough.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from align_cluster.algorithms.base import Batch
from align_cluster.algorithms.policy_gradient import PolicyGradient
from align_cluster.algorithms.terms import clipped_value_loss
from align_cluster.backbones import BACKBONES
from align_cluster.backbones.base import CRITIC, CriticSection
from align_cluster.settings import Root, Section


class WarmUp(Section):
    """At first only the critic learns, from the rewards themselves and without `value_clip`.

    This phase lasts `updates` actor updates' worth of steps, or until the critic explains `explained_variance` of the
    rewards at noise below .5.
    """

    updates: Annotated[int, Field(ge=0)] = 30
    explained_variance: Annotated[float, Field(le=1)] = 0.3


class PPO(PolicyGradient):
    """Trains the clipped surrogate with each step's own advantage, and a critic that regresses on returns."""

    class Config(Section):
        """Configures PPO.

        clip             bounds the ratio, as in GRPO
        advantage_clip   bounds the whitened advantages
        discount, decay  GAE's
        value_clip       how far a value may move in a step's updates before its loss has no gradient, in units of the
                         normalised reward
        critic_epochs    updates of the critic for each step
        critic_states    states of every sample that each of these updates reads, drawn anew (null: all)
        critic_batch     states that the critic reads at once, of any prompts; outside of training of one chunk
        """

        kind: Literal["ppo"] = "ppo"
        clip: PositiveFloat = 1e-4
        clip_high: PositiveFloat | None = None
        advantage_clip: PositiveFloat = 5.0
        discount: Annotated[float, Field(gt=0, le=1)] = 1.0
        decay: Annotated[float, Field(ge=0, le=1)] = 0.95
        value_clip: PositiveFloat = 0.2
        kl_beta: Annotated[float, Field(ge=0)] = 0.0
        kl_mode: Literal["no_dt", "exact_mean", "exact_sum"] = "no_dt"
        critic: CriticSection = CriticSection()
        critic_lr: PositiveFloat = 1e-4
        critic_epochs: PositiveInt = 1
        critic_states: PositiveInt | None = None
        critic_batch: PositiveInt = 24
        warm_up: WarmUp = WarmUp()

        def problems(self, where: str, run: Root) -> Iterator[str]:
            """Refuse what a critic cannot read, or cannot be trained with."""
            if not BACKBONES[run.backbone.kind].has_taps():
                able = [kind for kind, backbone in BACKBONES.items() if backbone.has_taps()]
                yield (
                    f"{where}.critic reads layers of the network, and backbone.kind {run.backbone.kind} does not say "
                    f"which (`critic_blocks`); set backbone.kind to {' or '.join(able)}, or choose another algorithm"
                )
            if run.learner.zero_stage == 3:
                yield (
                    "learner.zero_stage is 3, which cuts up the base that the critic reads too, outside of the engine; "
                    "set it to 2 or less"
                )
            if run.window.per_sample:
                yield (
                    "rollout.window.choice is per_sample, and with a critic all samples of a step train the same "
                    "denoising steps; set it to first or random"
                )

    needs_path = True

    @property
    def adapters(self) -> tuple[str, ...]:
        """The critic's adapter is on the shared base with `features: lora` only."""
        return ("default", CRITIC) if self.config.critic.features == "lora" else ("default",)

    @property
    def critic(self) -> CriticSection:
        """PPO always trains a critic."""
        return self.config.critic

    def advantage(self, batch: Batch, slot: int) -> torch.Tensor:
        """Each step has its own advantage."""
        return batch.advantages[:, slot]

    def value_loss(
        self, values: torch.Tensor, before: torch.Tensor, returns: torch.Tensor, pretraining: bool = False
    ) -> torch.Tensor:
        """Return the loss [b] of the critic's values [b, R]; `before` are the values before the update.

        A reward that does not judge a sample has return NaN, and its head is left out. In `pretraining`, while the
        actor waits, nothing is clipped.
        """
        judged, clip = torch.isfinite(returns), math.inf if pretraining else self.config.value_clip
        loss = clipped_value_loss(values, before, torch.where(judged, returns, values.detach()), clip)
        return (loss * judged).sum(1) / judged.sum(1).clamp(min=1)
