"""Holds every choice of a run in one model. Settings of rewards, algorithms and the like stand beside their code."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.advantage import AdvantageConfig
from align_cluster.backbones import BACKBONES
from align_cluster.checkpoint import CheckpointConfig
from align_cluster.conditions.exploration import E2po
from align_cluster.kinds import one_of
from align_cluster.learner.settings import LearnerConfig, LearnerSetup, OptimizerConfig
from align_cluster.observe.guards import GuardConfig
from align_cluster.observe.trackers import TRACKERS
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.groups import update_bounds
from align_cluster.rewards import REWARDS
from align_cluster.rollouts.schedule import SCHEDULES
from align_cluster.rollouts.steps import STEPS
from align_cluster.rollouts.windows import WINDOWS
from align_cluster.settings import Name, Root, Section


class RolloutConfig(Section):
    """Says how samplers draw images for training. Evaluation has its own settings and always draws without noise."""

    group_size: PositiveInt = 12
    """The number of images that are drawn for each prompt in a step, each from a noise of its own unless same_noise is
    set. With exploration every noise meets every condition, so a group has group_size x exploration.conditions images.
    Flow-GRPO and DiffusionNFT use 24, DanceGRPO 12 for FLUX; 1 is enough for ppo, srpo, refl and draft."""
    steps: PositiveInt = 10
    """The number of denoising steps of a training image. Flow-GRPO, DiffusionNFT and E2PO use 10 for SD3.5 Medium, SRPO
    25 for FLUX."""
    step: one_of(STEPS) | None = None
    """How one denoising step is taken, and with which noise. Null takes the algorithm's own kind: flow_sde for grpo and
    ppo, dpm2 for nft, euler for the others, and ddim or euler where the network predicts epsilon or v."""
    schedule: one_of(SCHEDULES) = SCHEDULES["native"].Config()
    """The noise levels of training rollouts. `native` takes those of the pipeline; evaluation always does. DanceGRPO,
    MixGRPO and SRPO use `linear`."""
    window: one_of(WINDOWS) | None = None
    """Which denoising steps draw noise, and which of them are trained. Only grpo and ppo train steps. Null draws noise
    in all steps and trains the first 99 % of them, as Flow-GRPO does. The last step is never trained."""
    same_noise: bool | Literal["step"] = False
    """Whether images start from the same noise. True starts all images of a group from one noise, as DanceGRPO can;
    "step" starts all images of a training step from one, as SRPO does. Images of a group then differ by the noise of
    their steps alone, so a step kind without noise needs false."""
    distilled_guidance: Annotated[float, Field(ge=0)] | None = None
    """The guidance strength that a guidance-distilled network, such as FLUX.1-dev, is fed with while it draws for
    training. Null takes backbone.distilled_guidance, and updates always do. SRPO's official scripts draw with 1 (HPS)
    or 2 (PickScore); grpo and ppo refuse it, because their updates must predict as the rollout did."""
    offline: bool = False
    """Whether the model trains on the prompts' own images instead of drawn ones. It needs prompts.kind images and
    algorithm.kind srpo."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """The scale of classifier-free guidance in rollouts and updates. 1 means none, and takes half as many network
    passes as any other. Flow-GRPO uses 4.5 for SD3.5 Medium, DiffusionNFT 1."""
    chunk: PositiveInt | None = None
    """The number of images that a sampler draws in one batch; they may be of any groups. Null lets the run choose it by
    the number of workers and the memory of a GPU, and keep it when it is resumed. Another size changes the last bits of
    every image."""
    merge_lora: bool | None = None
    """Whether samplers add the LoRA into the weights of the base, which draws faster. Null does so where it costs no
    accuracy: not for grpo and ppo, whose log-probs it would shift, and not in bf16 on GPUs, where it would round small
    updates away."""


class LoopConfig(Section):
    """Says how drawing and training take turns."""

    ahead: Literal[0, 1] | None = None
    """How many steps the samplers draw ahead of the learner. 0: samplers and learner take turns. 1: while the learner
    trains on a step, the samplers draw the next one with the weights of one update step before, and only the slower of
    both takes time. Null takes 1 where samplers and learners have GPUs of their own (cluster.samplers and
    cluster.learners are given, and both fit beside each other), else 0, so that on CPUs a run's bits do not depend on
    its number of samplers; the run keeps it when it is resumed."""

    @field_validator("ahead", mode="before")
    @classmethod
    def not_deeper(cls, ahead: Any) -> Any:
        """Refuse a deeper queue, with the reason."""
        if isinstance(ahead, int) and ahead > 1:
            raise ValueError(
                "0 or 1: one step ahead already keeps the slower of samplers and learner busy all the time, and each "
                "more would only make the weights that draw older"
            )
        return ahead


class ClusterConfig(Section):
    """Says where workers run, how many there are, and how long they may take. Only numbers of learners and threads
    change results, by rounding."""

    address: str | None = None
    """The Ray cluster to run on. Null takes the address in the environment variable RAY_ADDRESS, or starts a private
    Ray on this machine where that is not set. "auto" joins the Ray that runs on this machine."""
    nodes: Annotated[list[str], Field(min_length=1)] | None = None
    """The nodes of the cluster that workers run on, by name, address or Ray's id. Null uses all of them."""
    samplers: PositiveInt | None = None
    """The number of samplers that a run begins with. Null starts one for each GPU, or on CPUs one for every `threads`
    cores, but no more than a step has chunks."""
    max_samplers: PositiveInt | None = None
    """The number of samplers that may draw while chunks wait, where the cluster has room or gets it later. Null never
    adds any."""
    reward_workers: PositiveInt = 1
    """The number of workers that score all rewards without a pool of their own, one reward after the other. Raise it
    where scoring takes longer than drawing."""
    learners: PositiveInt | None = None
    """The number of DeepSpeed ranks that train. Null starts one for each GPU, or on CPUs one for every `threads` cores,
    but no more than an update has micro-batches."""
    threads: PositiveInt = 1
    """The number of CPU threads that each worker computes with. More threads mean fewer workers on CPUs."""
    condition_cache_gib: PositiveFloat | None = None
    """How much of Ray's object store encoded prompts may take, in GiB. Null takes a tenth of what is free at the start.
    Raise it where the log says that the prompts of one step do not fit."""
    timeout_s: PositiveFloat = 600.0
    """How many seconds a sampler or a learner rank may take for one call. A later one counts as lost and is replaced.
    The run ends where a sampler's call is late twice, or four ranks in a row are lost. Rewards have
    on_failure.timeout_s."""
    start_timeout_s: PositiveFloat = 1800.0
    """How many seconds a learner rank may take to start and to load its model. Raise it where weights come from a slow
    disk or network."""
    late_s: PositiveFloat = 60.0
    """After how many seconds without an answer the log says which worker is waited for. It says so again whenever that
    time has doubled."""

    @field_validator("max_samplers")
    @classmethod
    def not_below_the_minimum(cls, count: int | None, info: ValidationInfo) -> int | None:
        """Refuse fewer samplers at most than at first."""
        if count is not None and count < (info.data.get("samplers") or 1):
            raise ValueError(f"at least samplers, {info.data['samplers']}")
        return count


class EvaluateConfig(Section):
    """Configures held-out evaluation. It always takes place before and after a run, with ODE steps and fixed seeds."""

    prompts: one_of(PROMPTS)
    """The prompts that are evaluated on. None of them may be among the training prompts."""
    count: PositiveInt = 64
    """The number of different prompts that are evaluated, taken from each task in turn. The choice does not depend on
    the seed, and a larger count extends a smaller one."""
    images_per_prompt: PositiveInt = 4
    """The number of images that are drawn and scored for each prompt. GenEval's official protocol draws 4."""
    steps: PositiveInt | None = None
    """The number of denoising steps of an evaluation image. Null takes rollout.steps. Flow-GRPO, DiffusionNFT and E2PO
    evaluate SD3.5 Medium with 40."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """The scale of classifier-free guidance in evaluations; 1 means none. It is usually that of rollout.guidance."""
    every: Annotated[int, Field(ge=0)] = 0
    """The number of training steps between evaluations. 0 evaluates before and after the run only."""
    grid_every: Annotated[int, Field(ge=0)] = 10
    """The number of training steps between grids of sample images. 0 draws them before and after the run only."""
    grid_prompts: PositiveInt = 8
    """The number of prompts in a grid, one a row: the first of the `count` that are scored, or all of them."""
    grid_columns: PositiveInt = 4
    """The number of images of each prompt in a grid."""


def _not_shared(name: str) -> str:
    if name == "shared":
        raise ValueError("another name: shared is the pool of the rewards that have none of their own")
    return name


# Names of metrics and of pools come of them.
RewardName = Annotated[Name, AfterValidator(_not_shared)]


class RunConfig(Root):
    """Holds one alignment run."""

    what: ClassVar[str] = "a run"
    sample: ClassVar[str] = "configs/quickstart.yaml"

    name: Name
    """The name of the run and of its directory, OUT/NAME. Where that directory is taken, it becomes NAME-2, NAME-3 and
    so on."""
    out: str = "runs"
    """The folder that holds run directories. A relative path counts from the folder that you start from."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The seed of the run's random choices: the order of prompts, the noises, the steps and levels that are trained.
    Change it to see how far results vary by chance."""
    steps: PositiveInt
    """The number of training steps. Each one draws images, scores them and updates the model learner.updates_per_step
    times. A resumed run may change it."""
    prompts_per_step: PositiveInt = 8
    """The number of prompts in a training step, each with a group of images. Flow-GRPO and DiffusionNFT use 48."""
    backbone: one_of(BACKBONES)
    """The diffusion model that is aligned, its LoRA, and the size of its images."""
    prompts: one_of(PROMPTS)
    """Where the training prompts come from. A run goes through all of them in a random order before any prompt comes
    again."""
    rollout: RolloutConfig = RolloutConfig()
    """How images for training are drawn."""
    exploration: E2po | None = None
    """Draws every group under perturbed text conditions as well, as E2PO does; by default the update never sees them.
    Null draws under the prompts' own conditions only."""
    rewards: Annotated[dict[RewardName, one_of(REWARDS)], Field(min_length=1)]
    """The rewards that judge images, each under a name of its choice. The names appear in metrics and reports."""
    advantage: AdvantageConfig = AdvantageConfig()
    """How rewards become advantages. Algorithms that follow a reward's gradient (srpo, refl, draft) have none, and ppo
    takes those of its critic."""
    algorithm: one_of(ALGORITHMS)
    """The loss that the learner trains with, and its settings."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its learning rate."""
    learner: LearnerConfig = LearnerConfig()
    """How a step's images are cut into updates and batches, and how DeepSpeed shares them."""
    loop: LoopConfig = LoopConfig()
    """Whether the next step is drawn while the learner trains on one."""
    cluster: ClusterConfig = ClusterConfig()
    """Where workers run, how many there are, and how long they may take."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run saves its state, and where."""
    guard: GuardConfig = GuardConfig()
    """When the run counts as collapsing, and what it does then."""
    evaluate: EvaluateConfig
    """Which held-out prompts are evaluated, how and how often."""
    track: list[one_of(TRACKERS)] = []
    """Where the run's numbers go besides metrics.jsonl and TensorBoard, such as [{kind: wandb}, {kind: prometheus}]. A
    tracker that fails or is slow never stops or slows the training. A resumed run may change it."""

    @field_validator("track")
    @classmethod
    def has_each_tracker_once(cls, trackers: list[Section]) -> list[Section]:
        """Refuse two trackers of one kind, which would keep their files in the same place."""
        kinds = [tracker.kind for tracker in trackers]
        if len(set(kinds)) < len(kinds):
            raise ValueError("a list with each kind once")
        return trackers

    @property
    def trained(self) -> list[str]:
        """Return the names of the rewards that are trained on."""
        return [name for name, reward in self.rewards.items() if reward.role == "train"]

    @property
    def headline(self) -> str:
        """Return the column that is shown first: the first trained reward, or the detail that its class names."""
        name = self.trained[0]
        detail = REWARDS[self.rewards[name].kind].headline
        return f"reward/{name}/{detail}" if detail else f"reward/{name}"

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
    def anchored(self) -> bool:
        """Return whether a group has images of the prompt's own condition, which then come first."""
        return self.exploration is None or self.exploration.anchor

    @property
    def update_exploration(self) -> E2po | None:
        """Return the settings of exploration where updates see perturbed conditions."""
        perturbed = self.conditions > 1 and self.exploration.update == "perturbed"
        return self.exploration if perturbed else None

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
            exploration=self.update_exploration,
            optimizer=self.optimizer,
            learner=self.learner,
        )
