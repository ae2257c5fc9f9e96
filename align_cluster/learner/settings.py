"""Settings of the learner and its optimiser."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from align_cluster.algorithms.slas import Slas
from align_cluster.backbones.base import BackboneSection
from align_cluster.conditions.exploration import E2po
from align_cluster.rewards.base import RewardSection
from align_cluster.settings import Fraction, Section


class OptimizerConfig(Section):
    """Configures AdamW on the LoRA, in fp32."""

    lr: PositiveFloat = 3e-4
    """The learning rate of AdamW, before the schedule lowers it. The official Flow-GRPO and DiffusionNFT scripts use
    3e-4 for a LoRA."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's mean and of its square. Flow-GRPO uses 0.9 and 0.999."""
    eps: PositiveFloat = 1e-8
    """The number that AdamW adds to the root of the squared gradients before it divides by it. Flow-GRPO uses 1e-8."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW's decoupled weight decay, which lr multiplies. Flow-GRPO, DanceGRPO, DiffusionNFT and SRPO use 1e-4."""
    max_grad_norm: PositiveFloat = 1.0
    """The L2 norm over all trained weights to which larger gradients are scaled down; the critic's are scaled apart.
    Flow-GRPO, DanceGRPO and DiffusionNFT use 1, SRPO 0.1. Lower it where rewards collapse."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes through the run. `constant` keeps it; `linear` keeps it for the share `flat` of all
    updates and then lets it fall to 0 in a straight line, `cosine` in half a wave."""
    flat: Fraction = 0.25
    """The share of the run's updates before the learning rate begins to fall. `schedule: constant` does not read it."""
    final: Fraction = 0.05
    """The share of lr below which the learning rate does not fall. `schedule: constant` does not read it."""
    warm_up: Annotated[int, Field(ge=0)] = 0
    """The number of updates in which the learning rate rises to what the schedule gives, in even parts: update u of the
    first n, counted from 1, has u / n of it. 0 begins with all of it."""

    def rate(self, update: int, updates: int) -> float:
        """Return the learning rate of an update, counted from 0, of a run of so many updates."""
        progress = update / updates
        rate = self.lr * min(1.0, (update + 1) / self.warm_up) if self.warm_up else self.lr
        if self.schedule == "constant" or progress < self.flat:
            return rate
        left = (1 - progress) / (1 - self.flat)
        if self.schedule == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return rate * max(self.final, left)


class LearnerConfig(Section):
    """Configures the DeepSpeed engine, and how a step's work is cut."""

    updates_per_step: PositiveInt = 1
    """The number of optimiser updates that share the images of a training step. The first one trains the policy that
    drew the images, so ratios clip in later ones only. Flow-GRPO makes 2; DiffusionNFT makes 1, and 2 for OCR."""
    micro_batch: PositiveInt | None = None
    """The number of images, all of one chunk, that a learner reads in one forward pass. Null lets the run choose it by
    the memory of a GPU. For grpo and ppo it then is the whole chunk, which makes the learner's log-probs bitwise those
    of the rollout."""
    fold: PositiveInt | None = None
    """The number of inner passes (noise levels, branches) of each image that one forward pass holds. Null lets the run
    choose it by the memory of a GPU. grpo and ppo take 1, because their log-probs depend on the batch in the last
    bits."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed's ZeRO splits between ranks: 0 nothing, 1 the optimiser's moments, 2 the gradients too, 3 the
    weights as well. Take 3 where the base does not fit a GPU; ppo and SLAS's worst_case bound need 2 or less."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """The decay of the average of the weights that is evaluated and kept, moved after every update. It begins as
    min((1+u)/(10+u), ema) at update u. 0 evaluates the weights themselves. Flow-GRPO and DiffusionNFT use 0.9."""
    ratio_tolerance: PositiveFloat = 1e-5
    """The largest |log ratio| of learner to rollout, in nats per latent dimension, that passes the self-check before
    the first update. A run beyond it ends. Raise it only where it stays far below algorithm.clip."""
    guidance_gradient: Literal["cond_only", "both"] = "cond_only"
    """Which branches of a guided prediction carry gradient: the one with the prompt alone, or both. The official
    Flow-GRPO code detaches the other branch. It changes nothing at rollout.guidance 1."""
    gradient_checkpointing: bool = False
    """Whether the learner computes activations a second time instead of keeping them. That saves most of their memory
    and costs about one more forward pass. It also holds for the VAE where a reward's gradient goes through it."""


@dataclass(frozen=True, kw_only=True)
class LearnerSetup:
    """Holds everything of a run that a learner rank must know; `RunConfig.learner_setup` makes it.

    `rewards` are the trained ones by name, `step` is the kind of step that training rollouts take, `guidance` their
    classifier-free guidance, `shaping` SLAS's settings where advantages are shaped, and `exploration` E2PO's where
    updates see perturbed conditions.
    """

    seed: int
    steps: int
    backbone: BackboneSection
    algorithm: Section
    rewards: Mapping[str, RewardSection]
    step: Section
    guidance: float
    shaping: Slas | None
    exploration: E2po | None
    optimizer: OptimizerConfig
    learner: LearnerConfig
