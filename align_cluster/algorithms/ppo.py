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
    """At first only the critic learns, from rewards of images that the frozen actor draws, without `value_clip`."""

    updates: Annotated[int, Field(ge=0)] = 400
    """The most updates of the critic in this phase. 0 leaves the phase out."""
    explained_variance: Annotated[float, Field(le=1)] = 0.3
    """The share of every reward's variance at noise levels below 0.5, on the held-out prompts of the last `steps`
    steps, beyond which the phase ends early. A reward that did not vary is not explained. 1 never ends it early."""
    steps: Annotated[int, Field(ge=1, le=8)] = 4
    """The number of steps whose held-out images are taken together, because few images tell little."""


class Replay(Section):
    """States of images that were drawn in earlier steps, from which the critic learns again and again."""

    images: Annotated[int, Field(ge=0)] = 4096
    """The most images whose states the driver and every checkpoint keep, the last ones drawn. 0 keeps none, and then
    the critic learns from each step's own images, by the clipped loss of PPO."""
    states: PositiveInt = 2
    """The denoising states that are kept of each image, in fp16, chosen at random. They take 128 KiB each at 512
    pixels, so 4096 images with 2 of them take 1 GiB."""
    minibatch: PositiveInt = 128
    """The number of images, of all that are kept, that each update of the critic reads. The encodings of their prompts
    go to the learner with them."""


class PPO(PolicyGradient):
    """Latent actor-critic PPO: every trained step has an advantage of its own, from a critic that learns returns."""

    class Config(Section):
        """Configures PPO. Defaults that the paper's abstract and summaries do not state are our choice."""

        kind: Literal["ppo"] = "ppo"
        clip: PositiveFloat = 1e-4
        """The distance from 1 at which ratios are clipped, below and, unless clip_high is set, above. Log-probs are
        means over latent dimensions, so it is tiny: Flow-GRPO uses 1e-4. Small latents need more."""
        clip_high: PositiveFloat | None = None
        """The distance above 1 at which ratios are clipped. Null takes `clip`."""
        advantage_clip: PositiveFloat = 5.0
        """The bound on |advantage|, after advantages are whitened over all samples and the trained denoising steps of a
        training step."""
        discount: Annotated[float, Field(gt=0, le=1)] = 1.0
        """GAE's discount of what follows a denoising step. 1 counts the reward in full at every step."""
        decay: Annotated[float, Field(ge=0, le=1)] = 0.95
        """GAE's lambda. 1 compares the reward with the step's value, 0 compares the next value with it: less noise, but
        more of the critic's errors."""
        value_clip: PositiveFloat = 0.2
        """How far a value may move in a step's updates before its loss has no gradient, in standard deviations of the
        reward. Only a critic without replay reads it."""
        kl_beta: Annotated[float, Field(ge=0)] = 0.0
        """The weight of the KL from the base model in the actor's loss; 0 saves its network pass."""
        kl_mode: Literal["no_dt", "exact_mean", "exact_sum"] = "no_dt"
        """How the KL is measured: as the mean over latent dimensions without the time step in the variance (`no_dt`,
        Flow-GRPO's convention), as the exact mean, or as the exact sum. The published values of kl_beta belong to
        `no_dt`."""
        critic: CriticSection = CriticSection()
        """The critic's network."""
        critic_lr: PositiveFloat = 1e-4
        """The learning rate of the critic's own AdamW, which no schedule changes. The betas, eps, weight_decay and
        max_grad_norm of optimizer hold for it too. Too high a rate makes all values equal."""
        critic_epochs: PositiveInt = 4
        """How often the critic reads as many images as a training step draws: as minibatches of the replayed images, or
        without replay as one update from the step's own images each time."""
        critic_states: PositiveInt | None = None
        """The number of denoising states of every image that one update of the critic reads, drawn anew each time.
        Null reads all, or with replay all that are kept."""
        critic_batch: PositiveInt = 24
        """The number of states that the critic reads in one forward pass. It decides how much memory the critic takes.
        In training they are of any prompts; where values are only predicted, they are of one chunk."""
        critic_held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
        """The share of the training prompts, chosen by a hash of their text, that train the actor and never the critic:
        they tell what it has learned. 0, or a list of so few prompts that none is chosen, leaves `warm_up.updates`
        alone to end the warm-up."""
        replay: Replay = Replay()
        """The images of earlier steps from which the critic learns."""
        warm_up: WarmUp = WarmUp()
        """The phase at the start in which only the critic learns."""

        def critic_updates(self, images: int) -> int:
            """Return the critic's updates in a step that draws so many images."""
            if not self.replay.images:
                return self.critic_epochs
            return max(1, round(self.critic_epochs * images / self.replay.minibatch))

        def critic_reads(self, steps: int) -> int:
            """Return the states of an image of `steps` steps that one reading of it takes."""
            kept = min(self.replay.states, steps) if self.replay.images else steps
            return min(self.critic_states or kept, kept)

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
            drawn, replay = run.images_per_step, self.replay
            if 0 < replay.images < max(drawn, replay.minibatch):
                yield (
                    f"{where}.replay.images is {replay.images}, fewer than the {drawn} images of a step or than the "
                    f"{replay.minibatch} of replay.minibatch; set it to at least {max(drawn, replay.minibatch)}, or to "
                    "0 for no replay"
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
