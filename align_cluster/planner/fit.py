"""Whether a run fits on its GPUs, and what to change where it does not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from align_cluster.config.plan import HALF, Plan
from align_cluster.config.run import RunConfig
from align_cluster.planner.memory import Sizes, learner, sampler
from align_cluster.planner.rewards import models

GIB = 2**30
CONTEXT = GIB / 2  # what CUDA and its libraries take of a GPU, for each process
EFFICIENT = 4  # images in a batch, below which GPUs are not busy
SPARE = 0.05  # of a GPU's memory, which the allocator cannot use


def reward_bytes(config: RunConfig, rewards: Sequence[str]) -> float:
    """Weights in fp32 of all models of these rewards; those of models that are not known count nothing."""
    known = [model for name in rewards for model in models(config.rewards[name]) if model]
    return 4 * sum(model.parameters for model in known)


def fullest(config: RunConfig, plan: Plan, sizes: Sizes) -> float:
    """Bytes that the fullest GPU holds; without GPUs, that all workers hold."""
    drawing, training = (role(config, plan, sizes).total for role in (sampler, learner))
    rewards = {pool: reward_bytes(config, pool.rewards) for pool in plan.reward_pools}
    if not plan.gpus:
        scoring = sum(pool.workers * weights for pool, weights in rewards.items())
        return plan.samplers * drawing + plan.learners * training + scoring
    guests = [weights + CONTEXT for pool, weights in rewards.items() if pool.beside for _ in range(pool.workers)]
    own = [max(1, int(1 / pool.gpus)) * (weights + CONTEXT) for pool, weights in rewards.items() if pool.gpus >= HALF]
    shared = plan.together * (drawing + CONTEXT) + max(sum(guests[host :: plan.hosts]) for host in range(plan.hosts))
    alone = training + CONTEXT
    return max(shared, alone, *own) if plan.apart else max(shared + alone, *own, 0)


@dataclass(frozen=True)
class Change:
    """Settings to change, by section, what of the plan changes with them, and how to say it."""

    text: str
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)


def candidates(config: RunConfig, plan: Plan) -> Iterator[Change]:
    """What takes less memory, what costs least speed first."""
    if not config.learner.gradient_checkpointing:
        yield Change("learner.gradient_checkpointing: true", {"learner": {"gradient_checkpointing": True}})
    if config.backbone.text == "keep":
        yield Change("backbone.text: free", {"backbone": {"text": "free"}})
    chunks = [size for size in range(plan.chunk - 1, 0, -1) if config.group_members % size == 0]
    cuts = [Change(f"rollout.chunk: {chunk}", {"rollout": {"chunk": chunk}}) for chunk in chunks]
    yield from (cut for cut, chunk in zip(cuts, chunks, strict=True) if chunk >= EFFICIENT)
    if plan.gpus > 1 and not plan.apart:
        samplers, learners = plan.gpus // 2, plan.gpus - plan.gpus // 2
        apart = {"samplers": samplers, "learners": learners, "hosts": samplers, "together": 1, "learner_gpus": 1.0}
        yield Change(f"cluster.samplers: {samplers}, cluster.learners: {learners}", plan=apart)
    if plan.learners > 1 and config.learner.zero_stage < 3:
        yield Change("learner.zero_stage: 3", {"learner": {"zero_stage": 3}})
    yield from (cut for cut, chunk in zip(cuts, chunks, strict=True) if chunk < EFFICIENT)


def changed(config: RunConfig, settings: dict[str, dict[str, Any]]) -> RunConfig:
    """The config with other values in some sections."""
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in settings.items()}
    return config.model_copy(update=sections)


def remedy(config: RunConfig, plan: Plan, sizes: Sizes, memory: float) -> tuple[list[str], float]:
    """The fewest changes, in the order of `candidates`, with which a run fits into GPUs of so many bytes, and what the
    fullest GPU holds then; all of them where even they are too few."""

    def need(changes: list[Change]) -> float:
        then, planned = config, plan
        for change in changes:
            then, planned = changed(then, change.settings), replace(planned, **change.plan)
        return fullest(then, planned, sizes)

    chosen: list[Change] = []
    for change in candidates(config, plan):
        chosen.append(change)
        if fits(need(chosen), memory):
            break
    for change in reversed(list(chosen)):
        others = [other for other in chosen if other is not change]
        if fits(need(others), memory):
            chosen = others
    return [change.text for change in chosen], need(chosen)


def fits(need: float, memory: float) -> bool:
    return need <= (1 - SPARE) * memory
