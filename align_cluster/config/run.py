"""Holds every choice of a run in one model. Settings of rewards, algorithms and the like stand beside their code."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.advantage import AdvantageConfig
from align_cluster.backbones import BACKBONES
from align_cluster.checkpoint import CheckpointConfig
from align_cluster.conditions.perturb import E2po
from align_cluster.learner.settings import LearnerConfig, LearnerSetup, OptimizerConfig
from align_cluster.observe.guards import GuardConfig
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.groups import update_bounds
from align_cluster.rewards import REWARDS
from align_cluster.rollouts.schedule import SCHEDULES
from align_cluster.rollouts.steps import STEPS
from align_cluster.rollouts.windows import WINDOWS
from align_cluster.settings import Name, Root, Section, one_of


class RolloutConfig(Section):
    """Says how samplers draw. `group_size` counts initial noises; with exploration, each meets every condition.

    `step: null` takes the algorithm's own step kind. `schedule` gives training rollouts other noise levels than the
    pipeline's own, which evaluation always uses. `window` says which denoising steps are noisy and which are trained
    (null: 99 %, the first ones). `same_noise` starts a whole group from one noise, as DanceGRPO can; `step` all groups
    of a step, as SRPO does. `distilled_guidance` is what a guidance-distilled network is told while it draws for
    training (null: the backbone's), where the update does not need to draw alike. `offline` takes the images of
    prompts.kind images in the place of drawn ones.
    """

    group_size: PositiveInt = 12
    steps: PositiveInt = 10
    step: one_of(STEPS) | None = None
    schedule: one_of(SCHEDULES) = SCHEDULES["native"].Config()
    window: one_of(WINDOWS) | None = None
    same_noise: bool | Literal["step"] = False
    distilled_guidance: Annotated[float, Field(ge=0)] | None = None
    offline: bool = False
    guidance: Annotated[float, Field(ge=1)] = 1.0
    chunk: PositiveInt | None = Field(None, description="images drawn in one batch, of any groups; null: chosen")
    merge_lora: bool | None = Field(
        None,
        description="samplers add the LoRA into the base's weights, which draws faster; null: where nothing is lost",
    )


class ClusterConfig(Section):
    """Says where workers run. Counts of null are derived from the cores or GPUs of the cluster.

    `address: null` starts a Ray of its own on this machine; "auto" joins the running one. A run begins with `samplers`;
    while chunks wait, up to `max_samplers` draw, where the cluster has room or gets it later. After `late_s`
    without an answer the log says who is waited for, after `timeout_s` the worker is replaced, and where nothing helps
    the run ends. A learner rank has `start_timeout_s` to start and to load its model.
    """

    address: str | None = None
    samplers: PositiveInt | None = None
    max_samplers: PositiveInt | None = Field(None, description="null: as samplers")
    reward_workers: PositiveInt = 1
    learners: PositiveInt | None = None
    threads: PositiveInt = 1
    condition_cache_gib: PositiveFloat | None = Field(
        None, description="GiB of the object store for encoded prompts; null: a tenth of what is free at the start"
    )
    timeout_s: PositiveFloat = 600.0
    start_timeout_s: PositiveFloat = 1800.0
    late_s: PositiveFloat = 60.0

    @field_validator("max_samplers")
    @classmethod
    def not_below_the_minimum(cls, count: int | None, info: ValidationInfo) -> int | None:
        """Refuse fewer samplers at most than at first."""
        if count is not None and count < (info.data.get("samplers") or 1):
            raise ValueError(f"at least samplers, {info.data['samplers']}")
        return count


class EvaluateConfig(Section):
    """Configures held-out evaluation, by ODE sampling with fixed seeds.

    `every: 0` evaluates before and after the run. Grids show the first `grid_prompts` of the `count` prompts that are
    scored, or all of them where there are fewer.
    """

    prompts: one_of(PROMPTS)
    count: PositiveInt = 64
    images_per_prompt: PositiveInt = 4
    steps: PositiveInt | None = Field(None, description="null: as the rollout")
    guidance: Annotated[float, Field(ge=1)] = 1.0
    every: Annotated[int, Field(ge=0)] = 0
    grid_every: Annotated[int, Field(ge=0)] = 10
    grid_prompts: PositiveInt = 8
    grid_columns: PositiveInt = 4


def _not_shared(name: str) -> str:
    if name == "shared":
        raise ValueError("another name: shared is the pool of the rewards that have none of their own")
    return name


# Names of metrics and of pools come of them.
RewardName = Annotated[Name, AfterValidator(_not_shared)]


class RunConfig(Root):
    """Holds one alignment run.

    `exploration` draws every group under perturbed conditions too; the update never sees them.
    """

    what: ClassVar[str] = "a run"
    sample: ClassVar[str] = "configs/quickstart.yaml"

    name: Name
    out: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 0
    steps: PositiveInt
    prompts_per_step: PositiveInt = 8
    backbone: one_of(BACKBONES)
    prompts: one_of(PROMPTS)
    rollout: RolloutConfig = RolloutConfig()
    exploration: E2po | None = None
    rewards: Annotated[dict[RewardName, one_of(REWARDS)], Field(min_length=1)]
    advantage: AdvantageConfig = AdvantageConfig()
    algorithm: one_of(ALGORITHMS)
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    evaluate: EvaluateConfig

    @property
    def trained(self) -> list[str]:
        """Return the names of the rewards that are trained on."""
        return [name for name, reward in self.rewards.items() if reward.role == "train"]

    @property
    def step_kind(self) -> Section:
        """Return the settings of the sampler step that training rollouts take."""
        flow = BACKBONES[self.backbone.kind].flow
        return self.rollout.step or STEPS[ALGORITHMS[self.algorithm.kind].step_for(flow)].Config()

    @property
    def prediction(self) -> str:
        """Return what a step kind must be for: "flow", or "epsilon" where the network predicts epsilon or v."""
        return "flow" if BACKBONES[self.backbone.kind].flow else "epsilon"

    @property
    def tiny_last_level(self) -> bool:
        """Return whether the last step of training rollouts begins near noise level 0, as with SD3's schedule."""
        schedule = SCHEDULES[self.rollout.schedule.kind]
        return BACKBONES[self.backbone.kind].tiny_last_level if schedule.native else schedule.tiny_last_level

    @property
    def window(self) -> object | None:
        """Return the planner of the noisy and trained denoising steps; None where the algorithm needs no density."""
        if not ALGORITHMS[self.algorithm.kind].needs_density:
            return None
        settings = self.rollout.window or WINDOWS["fraction"].Config()
        return WINDOWS[settings.kind](settings)

    @property
    def conditions(self) -> int:
        """Return the number of conditions that each prompt is drawn under."""
        return self.exploration.conditions if self.exploration else 1

    @property
    def group_members(self) -> int:
        """Return the number of images of one prompt group: initial noises x conditions."""
        return self.rollout.group_size * self.conditions

    @property
    def images_per_step(self) -> int:
        """Return the number of images that a training step draws."""
        return self.prompts_per_step * self.group_members

    @property
    def update_bounds(self) -> list[int]:
        """Return the rows of a step at which its optimiser updates begin, and the number of all rows."""
        return update_bounds(self.prompts_per_step, self.group_members, self.learner.updates_per_step)

    @property
    def learner_setup(self) -> LearnerSetup:
        """Return what a learner rank must know of this run."""
        return LearnerSetup(
            seed=self.seed,
            steps=self.steps,
            backbone=self.backbone,
            algorithm=self.algorithm,
            rewards={name: self.rewards[name] for name in self.trained},
            step=self.step_kind,
            guidance=self.rollout.guidance,
            shaping=self.advantage.shaping,
            optimizer=self.optimizer,
            learner=self.learner,
        )
