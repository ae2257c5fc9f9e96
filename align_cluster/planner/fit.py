"""Bytes of each worker and of the fullest GPU, whether they fit, and the settings that save most where they do not."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from align_cluster.algorithms import ALGORITHMS
from align_cluster.config.plan import HALF, Plan
from align_cluster.config.run import RunConfig
from align_cluster.planner.memory import Sizes
from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import ModelSize
from align_cluster.settings import GIB

CONTEXT = GIB / 2  # bytes of a GPU that CUDA and its libraries take for each process
SPARE = 0.05  # part of a GPU's memory that the allocator cannot use
HINTS = 3  # settings that a run which does not fit is told about
ZERO3_LIVE_PARAMETERS = 10**9  # parameters that ZeRO 3 keeps whole at a time, DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of one worker. `optimizer` includes gradients and DeepSpeed's buffers."""

    weights: float
    lora: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        """All bytes of the worker."""
        return self.weights + self.lora + self.optimizer + self.activations


@dataclass(frozen=True)
class Hint:
    """A setting as a run file writes it, and the bytes that it alone saves on the fullest GPU."""

    setting: str
    saves: float


def reward_models(config: RunConfig, rewards: Iterable[str]) -> list[ModelSize | None]:
    """Return the sizes of the models that these rewards load; None stands for a model of unknown size."""
    sections = [config.rewards[name] for name in rewards]
    return [size for section in sections for size in REWARDS[section.kind](section).model_sizes()]


def reward_bytes(config: RunConfig, rewards: Iterable[str]) -> float:
    """Return the bytes of these rewards' weights in fp32. Models of unknown size count nothing."""
    return 4 * sum(model.parameters for model in reward_models(config, rewards) if model)


def sampler_memory(config: RunConfig, plan: Plan, sizes: Sizes) -> WorkerMemory:
    """Return a sampler's bytes with the settings of `config`, whose chunk may differ from the one in `plan`.

    Activations were counted with the plan's chunk and grow in proportion to it.
    """
    text = sizes.text if config.backbone.text == "keep" else 0
    activations = max(sizes.draw.bytes, sizes.decode.bytes) * config.rollout.chunk / plan.chunk
    return WorkerMemory(sizes.denoiser + sizes.vae + text, sizes.adapter, 0, activations)


def learner_memory(config: RunConfig, plan: Plan, sizes: Sizes) -> WorkerMemory:
    """Return a learner rank's bytes with the settings of `config`, whose batches may differ from those in `plan`.

    DeepSpeed keeps whole gradients up to stage 1. From stage 2 on it keeps a bucket as large as they are, and a rank's
    share of the gradients, of the optimizer's moments and of another fp32 copy of the weights. ZeRO 3 may take more.
    """
    stage, ranks, one = config.learner.zero_stage, plan.learners, sizes.adapter
    share = 1 / ranks if stage == 3 else 1
    weights = sizes.denoiser * share
    if stage == 3:
        weights += min(sizes.denoiser - weights, ZERO3_LIVE_PARAMETERS * sizes.itemsize)
    moments = 2 * one if stage == 0 else 3 * one / ranks
    gradients = (one, 2 * one, one + one / ranks, one + one / ranks)[stage]
    reward_weights, reward_activations = _reward_gradient(config, plan, sizes)
    used = sizes.learner(config)
    update = used.update.bytes * _growth(config, plan)
    return WorkerMemory(
        weights + sizes.critic_weights + reward_weights,
        one * (sizes.adapters * share + (1 if config.learner.ema else 0)),
        moments + gradients + 3 * sizes.critic_trained,
        max(update, used.critic.bytes) + reward_activations,
    )


def _growth(config: RunConfig, plan: Plan) -> float:
    """Return the rows that a learner reads at once with the settings of `config`, over those of `plan`."""
    return config.learner.micro_batch * config.learner.fold / plan.rows_per_pass


def _reward_gradient(config: RunConfig, plan: Plan, sizes: Sizes) -> tuple[float, float]:
    """Return the bytes of weights and of activations that a learner keeps to follow the gradients of rewards."""
    decode = sizes.learner(config).reward_decode
    if not decode.flops:
        return 0.0, 0.0
    models = [model for model in reward_models(config, config.trained) if model]
    weights, one_image = sizes.vae + reward_bytes(config, config.trained), sum(m.activations or 0 for m in models)
    if config.learner.gradient_checkpointing:  # one image at a time
        return weights, decode.bytes + one_image
    return weights, (decode.bytes + plan.rows_per_pass * one_image) * _growth(config, plan)


def fullest_gpu(config: RunConfig, plan: Plan, sizes: Sizes) -> float:
    """Return the bytes that the fullest GPU holds; without GPUs, the bytes that all workers hold."""
    drawing, training = (role(config, plan, sizes).total for role in (sampler_memory, learner_memory))
    rewards = {pool: reward_bytes(config, pool.rewards) for pool in plan.reward_pools}
    if not plan.gpus:
        scoring = sum(pool.workers * weights for pool, weights in rewards.items())
        return plan.samplers * drawing + plan.learners * training + scoring
    guests = [weights + CONTEXT for pool, weights in rewards.items() if pool.beside for _ in range(pool.workers)]
    own = [max(1, int(1 / pool.gpus)) * (weights + CONTEXT) for pool, weights in rewards.items() if pool.gpus >= HALF]
    shared = plan.together * (drawing + CONTEXT) + max(sum(guests[host :: plan.hosts]) for host in range(plan.hosts))
    alone = training + CONTEXT
    return max(shared, alone, *own) if plan.apart else max(shared + alone, *own, 0)


def fits(need: float, memory: float) -> bool:
    """Say whether `need` bytes fit into a GPU of `memory` bytes."""
    return need <= (1 - SPARE) * memory


def hints(config: RunConfig, plan: Plan, sizes: Sizes) -> list[Hint]:
    """Return the settings that save most on the fullest GPU, the best first. Each is measured alone."""
    need = fullest_gpu(config, plan, sizes)
    found = [Hint(setting, need - fullest_gpu(other, then, sizes)) for setting, other, then in options(config, plan)]
    return sorted((hint for hint in found if hint.saves > 0), key=lambda hint: -hint.saves)[:HINTS]


def options(config: RunConfig, plan: Plan) -> Iterator[tuple[str, RunConfig, Plan]]:
    """Yield settings that may save memory, each with the run's config and plan after the change.

    Batches are halved. Of a plan only the numbers change that memory depends on.
    """
    if not config.learner.gradient_checkpointing:
        yield "learner.gradient_checkpointing: true", changed(config, "learner", gradient_checkpointing=True), plan
    folds = not ALGORITHMS[config.algorithm.kind].needs_density  # else log-probs must come from equal batches
    kept = f", learner.fold: {config.learner.fold}" if folds else ""  # an open one would grow
    if (half := config.learner.fold // 2) > 0:
        yield f"learner.fold: {half}", changed(config, "learner", fold=half), plan
    if (half := config.learner.micro_batch // 2) > 0 and folds:
        yield f"learner.micro_batch: {half}{kept}", changed(config, "learner", micro_batch=half), plan
    if (half := config.rollout.chunk // 2) > 0:
        other, said = changed(config, "rollout", chunk=half), f"rollout.chunk: {half}"
        if config.learner.micro_batch > half:
            other, said = changed(other, "learner", micro_batch=half), f"{said}, learner.micro_batch: {half}{kept}"
        yield said, other, plan
    if config.backbone.text == "keep":
        yield "backbone.text: free", changed(config, "backbone", text="free"), plan
    if plan.learners > 1 and config.learner.zero_stage < 3:
        yield "learner.zero_stage: 3", changed(config, "learner", zero_stage=3), plan
    if plan.gpus > 1 and not plan.apart:
        samplers, learners = plan.gpus // 2, plan.gpus - plan.gpus // 2
        apart = {"samplers": samplers, "learners": learners, "hosts": samplers, "together": 1, "learner_gpus": 1.0}
        yield f"cluster.samplers: {samplers}, cluster.learners: {learners}", config, replace(plan, **apart)


def changed(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """Return the config with other values in one section."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
