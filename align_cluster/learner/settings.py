"""Settings of the learner and its optimiser."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from align_cluster.algorithms.advantage import Slas
from align_cluster.backbones.base import BackboneSection
from align_cluster.rewards.base import RewardSection
from align_cluster.settings import Fraction, Section


class OptimizerConfig(Section):
    """Configures AdamW on the LoRA, in fp32.

    With `schedule: linear` the learning rate is flat for the share `flat` of the run, then falls to `final` x lr.
    """

    lr: PositiveFloat = 3e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    max_grad_norm: PositiveFloat = 1.0
    schedule: Literal["constant", "linear"] = "constant"
    flat: Fraction = 0.25
    final: Fraction = 0.05


class LearnerConfig(Section):
    """Configures the DeepSpeed engine, and how a step's work is cut.

    `updates_per_step` optimiser updates share a step's images. A forward pass reads `micro_batch` images of one chunk,
    in `fold` inner passes (noise levels, branches) at once where no log-probs are compared; null: chosen by
    `config.plan.settle`. Micro-batches of whole chunks make the learner's log-probs bitwise those of the rollout.
    `ratio_tolerance` bounds |log ratio| before the first update. `guidance_gradient` says through which branch of a
    guided prediction gradients flow (the official Flow-GRPO code: cond_only). `gradient_checkpointing` computes
    activations twice instead of keeping them.
    """

    updates_per_step: PositiveInt = 1
    micro_batch: PositiveInt | None = None
    fold: PositiveInt | None = None
    zero_stage: Literal[0, 1, 2, 3] = 2
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.9
    ratio_tolerance: PositiveFloat = 1e-5
    guidance_gradient: Literal["cond_only", "both"] = "cond_only"
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class LearnerSetup:
    """Holds everything of a run that a learner rank must know; `RunConfig.learner_setup` makes it.

    `rewards` are the trained ones by name, `step` is the kind of step that training rollouts take, `guidance` their
    classifier-free guidance, and `shaping` SLAS's settings where advantages are shaped.
    """

    seed: int
    steps: int
    backbone: BackboneSection
    algorithm: Section
    rewards: Mapping[str, RewardSection]
    step: Section
    guidance: float
    shaping: Slas | None
    optimizer: OptimizerConfig
    learner: LearnerConfig
