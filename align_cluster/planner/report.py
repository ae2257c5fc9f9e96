"""Reports what a run takes, as numbers and as text: parameters, bytes, FLOPs, seconds, and whether it fits."""

from collections.abc import Iterator
from dataclasses import dataclass

from align_cluster.algorithms import ALGORITHMS
from align_cluster.config.plan import Plan, RewardPool
from align_cluster.config.run import RunConfig
from align_cluster.config.split import best_split, step_time
from align_cluster.planner.fit import (
    CONTEXT,
    GIB,
    Hint,
    WorkerMemory,
    changed,
    fits,
    fullest_gpu,
    hints,
    learner_memory,
    reward_bytes,
    reward_models,
    sampler_memory,
)
from align_cluster.planner.memory import Sizes, measure

FRACTION = 0.4  # part of a GPU's peak that good training code reaches
# Dense TFLOP/s in bf16 and in fp32, by a part of the device's name (NVIDIA's data sheets).
PEAKS = {
    "B200": (2250, 75),
    "H200": (989, 67),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "RTX 4090": (165, 82.6),
}
MOST_SPLITS = 9  # splits of GPUs that a plan compares
ASSUMED = "H100"  # the GPU whose peak counts where the planned one is not in PEAKS


@dataclass(frozen=True)
class Pace:
    """Says how long a step takes with `loop.ahead` and so many workers; `shared`: each GPU has one of either kind."""

    ahead: int
    samplers: int
    learners: int
    shared: bool
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """Holds what a run takes.

    parameters  number of parameters of each part, and of one adapter as "lora"
    roles       bytes of one worker of each kind, by name
    flops       FLOPs of one image in each stage of a step
    seconds     seconds of a step by stage, at FRACTION of the peak of `gpu`; empty on CPUs
    paces       seconds of a step where samplers and learners take turns, and where they work at the same time, with
                their numbers; empty on CPUs
    need        bytes that the fullest GPU holds
    memory      bytes that each GPU has, where that is known
    hints       the settings that save most memory, where the run does not fit
    """

    parameters: dict[str, int]
    roles: dict[str, WorkerMemory]
    flops: dict[str, float]
    seconds: dict[str, float]
    paces: tuple["Pace", ...]
    gpu: str
    need: float
    memory: float | None
    hints: tuple[Hint, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Tell whether the fullest GPU holds the run; None where its memory is not known."""
        return None if self.memory is None else fits(self.need, self.memory)


def estimate(config: RunConfig, plan: Plan, memory: float | None = None, device_name: str = "") -> Estimate:
    """Count a run on the GPUs of its plan, with `memory` bytes each, or on CPUs. That takes seconds of a core.

    UserError where the settings of the run's model cannot be read.
    """
    sizes = measure(config, plan, "cuda" if plan.gpus else "cpu")
    gpu = next((name for name in PEAKS if name in device_name), ASSUMED)
    flops, need = image_flops(config, plan, sizes), fullest_gpu(config, plan, sizes)
    known, seconds = memory if plan.gpus else None, step_seconds(config, plan, flops, gpu) if plan.gpus else {}
    return Estimate(
        parameters=sizes.parameters,
        roles=roles(config, plan, sizes),
        flops=flops,
        seconds=seconds,
        paces=tuple(paces(config, plan, flops, seconds)) if plan.gpus else (),
        gpu=gpu,
        need=need,
        memory=known,
        hints=() if known is None or fits(need, known) else tuple(hints(config, plan, sizes)),
        notes=tuple(notes(config, plan)),
    )


def local_gpu() -> tuple[str, float | None]:
    """Return the name and the bytes of this machine's first GPU; ("", None) where there is none."""
    import torch

    if not torch.cuda.is_available():
        return "", None
    device = torch.cuda.get_device_properties(0)
    return device.name, float(device.total_memory)


def roles(config: RunConfig, plan: Plan, sizes: Sizes) -> dict[str, WorkerMemory]:
    """Return the bytes of each kind of worker, and of the learner with another ZeRO stage or checkpointing."""
    stage, checkpointing = config.learner.zero_stage, config.learner.gradient_checkpointing
    variants = {f"learner with ZeRO {n}": {"zero_stage": n} for n in range(4) if n != stage}
    variants[f"learner {'without' if checkpointing else 'with'} checkpointing"] = {
        "gradient_checkpointing": not checkpointing
    }
    found = {"sampler": sampler_memory(config, plan, sizes)}
    for name, values in ({f"learner, ZeRO {stage}": {}} | variants).items():
        found[name] = learner_memory(changed(config, "learner", **values), plan, sizes)
    for pool in plan.reward_pools:
        found[f"rewards {', '.join(pool.rewards)}"] = WorkerMemory(reward_bytes(config, pool.rewards))
    return found


def image_flops(config: RunConfig, plan: Plan, sizes: Sizes) -> dict[str, float]:
    """Return the FLOPs of one image in each stage. Its text's encoding is left out, because encodings are kept."""
    used = sizes.learner(config)
    update = used.update.flops / plan.rows_per_pass + reward_gradient_flops(config, plan, sizes)
    return {
        "rollout": (config.rollout.steps * sizes.draw.flops + sizes.decode.flops) / plan.chunk,
        "reward": sum(pool_flops(config, pool) for pool in plan.reward_pools),
        "update": plan.inner_passes * update + critic_flops(config, plan, sizes),
    }


def critic_flops(config: RunConfig, plan: Plan, sizes: Sizes) -> float:
    """Return the FLOPs of judging an image's states and of training the critic on them."""
    if not sizes.values.flops:
        return 0.0
    steps, settings = config.rollout.steps, config.algorithm
    states = settings.critic_epochs * settings.critic_reads(steps)
    return (steps * sizes.values.flops + states * sizes.learner(config).critic.flops) / settings.critic_batch


def reward_gradient_flops(config: RunConfig, plan: Plan, sizes: Sizes) -> float:
    """Return the FLOPs of one image's rewards and their gradients on the learner, 0 where no algorithm follows them.

    A backward pass without gradients of weights costs as much as a forward pass.
    """
    decode = sizes.learner(config).reward_decode
    if not decode.flops:
        return 0.0
    model = sum(model.flops or 0.0 for model in reward_models(config, config.trained) if model)
    if config.learner.gradient_checkpointing:
        return decode.flops + sizes.decode.flops / plan.chunk + 3 * model
    return decode.flops / plan.rows_per_pass + 2 * model


def pool_flops(config: RunConfig, pool: RewardPool) -> float:
    """Return the FLOPs of one image's scores in a pool. Models of unknown FLOPs count nothing."""
    return sum(model.flops or 0.0 for model in reward_models(config, pool.rewards) if model)


def step_seconds(config: RunConfig, plan: Plan, flops: dict[str, float], gpu: str) -> dict[str, float]:
    """Return the seconds of a step's stages. Rewards compute in fp32 beside the rollout; CPU pools are left out."""
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


def paces(config: RunConfig, plan: Plan, flops: dict[str, float], seconds: dict[str, float]) -> Iterator[Pace]:
    """Yield how long a step takes with `loop.ahead` 0 and 1: with the plan's workers where they have GPUs of their own
    or the settings state them, else with the best ones; and then with other splits of the GPUs.

    Scoring goes on beside the rollout, and is over before the update.
    """
    one_gpu = seconds["rollout"] * (plan.hosts if plan.apart else min(plan.gpus, plan.samplers)) / flops["rollout"]
    work = (one_gpu * flops["rollout"], one_gpu * flops["update"])
    own, stated = (plan.samplers, plan.learners), config.cluster.samplers or config.cluster.learners
    shared = not (plan.apart and stated)
    together = (min(plan.gpus, plan.pieces[0]), min(plan.gpus, plan.pieces[1])) if shared else own
    drawn = max(step_time((work[0], 0.0), plan.pieces, together), seconds["reward"])
    yield Pace(0, *together, shared, drawn + step_time((0.0, work[1]), plan.pieces, together))
    if plan.gpus < 2:
        return
    best = best_split(work, plan.pieces, plan.gpus)
    splits = dict.fromkeys([own if plan.apart else best, best, *((s, plan.gpus - s) for s in range(1, plan.gpus))])
    for split in list(splits)[:MOST_SPLITS]:
        yield Pace(1, *split, False, max(step_time(work, plan.pieces, split), seconds["reward"]))


def notes(config: RunConfig, plan: Plan) -> Iterator[str]:
    """Yield a sentence for each part of the run that the estimate leaves out."""
    for name in config.rewards:
        models = reward_models(config, [name])
        if None in models:
            yield f"the size of rewards.{name}'s model is not known, and counts nothing here"
        elif any(model.flops is None for model in models):
            yield f"the FLOPs of rewards.{name}'s model are not known, and count nothing here"
    for name in config.trained if ALGORITHMS[config.algorithm.kind].reward_gradient else ():
        if any(model is None or model.activations is None for model in reward_models(config, [name])):
            yield f"what gradients of rewards.{name} keep on the learner is not known, and counts nothing here"
    if plan.gpus and not all(pool.gpus for pool in plan.reward_pools):
        yield "rewards without pool.gpus compute on CPUs, whose seconds are not predicted"
    if config.learner.zero_stage == 3:
        yield "ZeRO 3 takes at least this much: DeepSpeed keeps inputs of layers there that other stages release"


def text(config: RunConfig, plan: Plan, found: Estimate) -> str:
    """Write an estimate as text."""
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
    for pace in found.paces[:2]:
        how = "on the same GPUs" if pace.shared else "on GPUs of their own"
        workers = f"{pace.samplers} samplers and {pace.learners} learners {how}"
        rows.append((f"a step, loop.ahead {pace.ahead}", f"{pace.seconds:.3g} s with {workers}"))
    if others := ", ".join(f"{pace.samplers} + {pace.learners}: {pace.seconds:.3g}" for pace in found.paces[2:]):
        rows.append(("with other splits", f"{others}, in seconds"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    said = [f"note: {note}" for note in found.notes]
    return "\n".join([*lines, "", *memory_table(found), "", *verdict(plan, found), *said])


def memory_table(found: Estimate) -> Iterator[str]:
    """Yield the lines of a table of each worker's bytes."""
    width = max(len(name) for name in found.roles)
    unit, name = unit_of(max(role.total for role in found.roles.values()))
    titles = ("weights", "LoRA", "optimizer", "activations", "total")
    yield f"{f'{name} a worker':<{width}}" + "".join(f"{title:>13}" for title in titles)
    for name, role in found.roles.items():
        yield f"{name:<{width}}" + "".join(f"{getattr(role, title.lower()) / unit:>13.2f}" for title in titles)


def verdict(plan: Plan, found: Estimate) -> Iterator[str]:
    """Yield what the fullest GPU holds, whether that fits, and the settings that save most where it does not."""
    holds = f"the fullest GPU holds {found.need / GIB:.1f}"
    cuda = f"{CONTEXT / GIB:g} for each process's CUDA"
    if not plan.gpus:
        unit, name = unit_of(found.need)
        yield f"all workers hold {found.need / unit:.1f} {name}, besides Python and its libraries"
    elif found.memory is None:
        yield f"{holds} GiB with {cuda}; --gpu-memory GIB says whether it fits"
    else:
        fit = "it fits" if found.fits else "it does not fit"
        yield f"{holds} of {found.memory / GIB:.4g} GiB with {cuda}: {fit}"
    if found.fits is False:
        saved = [(hint.setting, hint.saves, *unit_of(hint.saves)) for hint in found.hints]
        said = ", ".join(f"{setting} ({saves / unit:.1f} {name})" for setting, saves, unit, name in saved)
        yield f"these settings save most, each alone: {said}" if said else "no setting saves memory: take larger GPUs"


def unit_of(size: float) -> tuple[int, str]:
    """Return the unit that bytes of this size are told in, and its name."""
    return (GIB, "GiB") if size >= GIB else (2**20, "MiB")


def amount(count: float) -> str:
    """Write a number with three digits and a letter for its size."""
    for size, letter in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"
