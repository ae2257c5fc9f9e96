"""What a run takes, as numbers and as text."""

from collections.abc import Iterator
from dataclasses import dataclass

from align_cluster.algorithms import ALGORITHMS
from align_cluster.config.plan import Plan, RewardPool
from align_cluster.config.run import RunConfig
from align_cluster.planner.fit import CONTEXT, GIB, changed, fits, fullest, remedy, reward_bytes
from align_cluster.planner.memory import Role, Sizes, learner, measure, sampler
from align_cluster.planner.rewards import models

FRACTION = 0.4  # of a GPU's peak, which good training code reaches
# Dense TFLOP/s in bf16 and in fp32, by a part of the device's name (NVIDIA's data sheets).
PEAKS = {
    "B200": (2250, 75),
    "H200": (989, 67),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "RTX 4090": (165, 82.6),
}
CUDA = f"{CONTEXT / GIB:g} for each process's CUDA"
ASSUMED = "H100"  # where the GPUs that a run is planned for are not here


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    parameters  of each part, and of one adapter
    roles       bytes of one worker of each kind, by name
    flops       of one image, in each stage of a step
    seconds     of a step, by stage, at FRACTION of the peak of `gpu`; empty on CPUs
    need        bytes that the fullest GPU holds, `memory` those that it has, where that is known
    changes     settings with which it takes `then` bytes, where the memory does not suffice
    """

    parameters: dict[str, int]
    roles: dict[str, Role]
    flops: dict[str, float]
    seconds: dict[str, float]
    gpu: str
    need: float
    memory: float | None
    changes: tuple[str, ...]
    then: float
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else fits(self.need, self.memory)


def estimate(config: RunConfig, plan: Plan, memory: float | None = None, device_name: str = "") -> Estimate:
    """Count a run on the GPUs of its plan, of `memory` bytes each, or on CPUs: half a minute for the largest models.

    UserError where the settings of its model are not at hand.
    """
    sizes = measure(config, plan, "cuda" if plan.gpus else "cpu")
    gpu = next((name for name in PEAKS if name in device_name), ASSUMED)
    flops, need = image_flops(config, plan, sizes), fullest(config, plan, sizes)
    known = memory if plan.gpus else None
    changes, then = ([], need) if known is None or fits(need, known) else remedy(config, plan, sizes, known)
    return Estimate(
        parameters=sizes.parameters,
        roles=roles(config, plan, sizes),
        flops=flops,
        seconds=step_seconds(config, plan, flops, gpu) if plan.gpus else {},
        gpu=gpu,
        need=need,
        memory=known,
        changes=tuple(changes),
        then=then,
        notes=tuple(notes(config, plan)),
    )


def local_gpu() -> tuple[str, float | None]:
    """(name, bytes) of this machine's first GPU; ("", None) where there is none."""
    import torch

    if not torch.cuda.is_available():
        return "", None
    device = torch.cuda.get_device_properties(0)
    return device.name, float(device.total_memory)


def roles(config: RunConfig, plan: Plan, sizes: Sizes) -> dict[str, Role]:
    """The run's own workers, and what the learner would hold with other settings."""
    other, chosen = not config.learner.gradient_checkpointing, config.learner.zero_stage
    variants = {f"learner with ZeRO {stage}": {"zero_stage": stage} for stage in range(4) if stage != chosen}
    variants[f"learner {'with' if other else 'without'} checkpointing"] = {"gradient_checkpointing": other}
    return (
        {"sampler": sampler(config, plan, sizes), f"learner, ZeRO {chosen}": learner(config, plan, sizes)}
        | {name: learner(changed(config, {"learner": values}), plan, sizes) for name, values in variants.items()}
        | {f"rewards {', '.join(pool.rewards)}": Role(reward_bytes(config, pool.rewards)) for pool in plan.reward_pools}
    )


def image_flops(config: RunConfig, plan: Plan, sizes: Sizes) -> dict[str, float]:
    """FLOPs of one image in each stage. Its text's encoding is left out: that is kept."""
    used = sizes.checkpointed if config.learner.gradient_checkpointing else sizes.update
    critic = 0
    if sizes.critic.flops:
        steps, settings = config.rollout.steps, config.algorithm
        states = settings.critic_epochs * min(settings.critic_states or steps, steps)
        learn = sizes.critic_checkpointed if config.learner.gradient_checkpointing else sizes.critic
        critic = (steps * sizes.values.flops + states * learn.flops) / plan.critic_batch
    return {
        "rollout": (config.rollout.steps * sizes.draw.flops + sizes.decode.flops) / plan.chunk,
        "reward": sum(pool_flops(config, pool) for pool in plan.reward_pools),
        "update": plan.inner_passes * used.flops / plan.micro_batch
        + critic
        + plan.inner_passes * judged(config, plan, sizes),
    }


def judged(config: RunConfig, plan: Plan, sizes: Sizes) -> float:
    """FLOPs of one image's reward on the learner, with its backward: without gradients of weights that costs as much as
    a forward."""
    if not sizes.judge.flops:
        return 0.0
    tower = sum(m.flops or 0.0 for name in config.trained for m in models(config.rewards[name]) if m)
    if config.learner.gradient_checkpointing:
        return sizes.frugal.flops + sizes.decode.flops / plan.chunk + 3 * tower
    return sizes.judge.flops / plan.micro_batch + 2 * tower


def pool_flops(config: RunConfig, pool: RewardPool) -> float:
    found = [model for name in pool.rewards for model in models(config.rewards[name]) if model]
    return sum(model.flops or 0.0 for model in found)


def step_seconds(config: RunConfig, plan: Plan, flops: dict[str, float], gpu: str) -> dict[str, float]:
    """Seconds of a step's stages. Rewards compute in fp32, beside the rollout; those on CPUs are left out."""
    bf16, fp32 = (FRACTION * 1e12 * peak for peak in PEAKS[gpu])
    rewards = [
        pool_flops(config, pool) / (fp32 * (min(pool.workers, plan.hosts) if pool.beside else pool.workers * pool.gpus))
        for pool in plan.reward_pools
        if pool.gpus
    ]
    rate = bf16 if config.backbone.precision == "bf16" else fp32
    per_image = {
        "rollout": flops["rollout"] / (rate * (plan.hosts if plan.apart else min(plan.gpus, plan.samplers))),
        "reward": max(rewards, default=0.0),
        "update": flops["update"] / (rate * plan.learners),
    }
    return {stage: plan.images_per_step * seconds for stage, seconds in per_image.items()}


def notes(config: RunConfig, plan: Plan) -> Iterator[str]:
    for name, reward in config.rewards.items():
        found = models(reward)
        if None in found:
            yield f"the size of rewards.{name}'s model is not known, and counts nothing here"
        elif any(model.flops is None for model in found):
            yield f"the FLOPs of rewards.{name}'s model are not known, and count nothing here"
    if ALGORITHMS[config.algorithm.kind].reward_gradient:
        unseen = [n for n in config.trained for m in models(config.rewards[n]) if m is None or m.activations is None]
        if unseen:
            yield f"what gradients of rewards.{unseen[0]} keep on the learner is not known, and counts nothing here"
    if plan.gpus and not all(pool.gpus for pool in plan.reward_pools):
        yield "rewards without pool.gpus compute on CPUs, whose seconds are not predicted"
    if config.learner.zero_stage == 3:
        yield "ZeRO 3 takes at least so much: DeepSpeed keeps inputs of layers there that others let go"


def text(config: RunConfig, plan: Plan, found: Estimate) -> str:
    """An estimate as text."""
    whole = {name: count for name, count in found.parameters.items() if name != "lora"}
    lora = found.parameters["lora"]
    shares = " : ".join(f"{found.flops[stage] / found.flops['rollout']:.3g}" for stage in found.flops)
    rows = [
        ("parameters", ", ".join(f"{name} {amount(count)}" for name, count in whole.items())),
        ("LoRA", f"{amount(lora)} parameters of rank {config.backbone.lora.rank}, {4 * lora / 2**20:.1f} MiB"),
        ("FLOPs an image", ", ".join(f"{amount(count)} in the {stage}" for stage, count in found.flops.items())),
        ("rollout : reward : update", f"{shares} in FLOPs"),
    ]
    if found.seconds:
        times = ", ".join(f"{stage} {seconds:.3g}" for stage, seconds in found.seconds.items())
        rows.append(("seconds a step", f"{times}, at {FRACTION:.0%} of the peak of each {found.gpu}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    said = [f"note: {note}" for note in found.notes]
    return "\n".join([*lines, "", *memory_table(found), "", *verdict(plan, found), *said])


COLUMNS = {
    "weights": "weights",
    "lora": "LoRA",
    "optimizer": "optimizer",
    "activations": "activations",
    "total": "total",
}


def memory_table(found: Estimate) -> Iterator[str]:
    width = max(len(name) for name in found.roles)
    unit, name = unit_of(max(role.total for role in found.roles.values()))
    yield f"{f'{name} a worker':<{width}}" + "".join(f"{title:>13}" for title in COLUMNS.values())
    for name, role in found.roles.items():
        yield f"{name:<{width}}" + "".join(f"{getattr(role, column) / unit:>13.2f}" for column in COLUMNS)


def unit_of(size: float) -> tuple[int, str]:
    return (GIB, "GiB") if size >= GIB else (2**20, "MiB")


def verdict(plan: Plan, found: Estimate) -> Iterator[str]:
    need = f"{found.need / GIB:.1f}"
    if not plan.gpus:
        unit, name = unit_of(found.need)
        yield f"all workers hold {found.need / unit:.1f} {name}, besides Python and its libraries"
    elif found.memory is None:
        yield f"the fullest GPU holds {need} GiB with {CUDA}; --gpu-memory GIB says whether it fits"
    else:
        has = f"{found.memory / GIB:.4g}"
        yield f"the fullest GPU holds {need} of {has} GiB with {CUDA}: it {'fits' if found.fits else 'does not fit'}"
    if found.fits is False:
        advice = f"with {', '.join(found.changes) or 'no other setting'} it holds {found.then / GIB:.1f} GiB"
        yield advice if fits(found.then, found.memory) else f"{advice}, which is too much as well: take larger GPUs"


def amount(count: float) -> str:
    """A number with three digits and a letter for its size."""
    for size, letter in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"
