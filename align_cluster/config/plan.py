"""Plans a run: turns its settings and the machine's resources into pools, batches and resource shares.

The user states groups and updates; this module alone turns them into worker counts, and no result depends on it.
"""

import math
from collections import Counter
from dataclasses import KW_ONLY, dataclass

from align_cluster.algorithms import ALGORITHMS
from align_cluster.config.run import RunConfig
from align_cluster.config.split import beside
from align_cluster.errors import UserError
from align_cluster.learner.batching import Part, assign_updates
from align_cluster.machine import cores
from align_cluster.prompts.groups import chunk_spans

# Samplers and learners that take turns share a core, one of each; where they do not, each has SHARE of one. Rewards
# overlap with the samplers.
SHARE = 0.9
TURN = SHARE / 2
REST = 1 - SHARE
# Of a GPU, a learner rank asks for one half; samplers and rewards that ask for less than a half share the other one.
HALF = 0.5
LEAST = 0.05  # what must be left of it for samplers
# Rows in a forward pass beyond which the embedded model on a core, and large models on a GPU, hardly get faster.
ROWS = 48


@dataclass(frozen=True)
class Rows:
    """Says how many rows a worker takes at once: a sampler in a forward pass (`draw`), a learner with its backward
    pass (`train`)."""

    draw: int = ROWS
    train: int = ROWS


def settle(config: RunConfig, cores: int, gpus: int, most: Rows = Rows()) -> RunConfig:  # noqa: B008 - it is frozen
    """Return the config with a value for all that it leaves open and that results depend on: a run is a function of it.

    `most` is what a worker's memory holds. Rows are shared out evenly, so that no worker waits for another one's last
    chunk; counts of workers that the config states make no difference. Where the learner must batch as the rollout did,
    because log-probs depend on the batch in their last bits, chunks are micro-batches.
    """
    slots = places(config, cores, gpus)
    algorithm = ALGORITHMS[config.algorithm.kind](config.algorithm)
    per_update = math.ceil(config.images_per_step / config.learner.updates_per_step)
    free, alike = not algorithm.needs_density, min(most.draw, most.train)
    chunk, micro_batch = config.rollout.chunk, config.learner.micro_batch
    if not chunk and free:
        chunk = max(_even(config.images_per_step, slots, most.draw), micro_batch or 1)
    chunk = chunk or micro_batch or _even(per_update, slots, alike)
    micro_batch = micro_batch or (min(chunk, _even(per_update, slots, most.train)) if free else chunk)
    passes, together = inner_passes(config), max(1, most.train // micro_batch)
    fold = config.learner.fold or (_even(passes, 1, together) if free else 1)
    merge = config.rollout.merge_lora
    if merge is None:
        # Weights in bf16 would round small updates away, and log-probs are compared with those of a plain network.
        merge = free and not (gpus and config.backbone.precision == "bf16")
    ahead, stated = config.loop.ahead, (config.cluster.samplers, config.cluster.learners)
    if ahead is None:
        ahead = int(gpus > 0 and all(stated) and sum(stated) <= slots)
    return config.model_copy(
        update={
            "loop": config.loop.model_copy(update={"ahead": ahead}),
            "rollout": config.rollout.model_copy(update={"chunk": chunk, "merge_lora": merge}),
            "learner": config.learner.model_copy(update={"micro_batch": micro_batch, "fold": fold}),
        }
    )


def places(config: RunConfig, cores: int, gpus: int) -> int:
    """Return how many samplers or learners fit beside each other: the GPUs that rewards leave, or else the cores by the
    threads of a worker."""
    return max(0, gpus - _reward_gpus(config)) or max(1, cores // config.cluster.threads)


def _even(total: int, workers: int, most: int) -> int:
    """Return the size of equal parts of `total`, at most `most`, whose number is a multiple of `workers`."""
    return math.ceil(total / (workers * math.ceil(total / (workers * most))))


def inner_passes(config: RunConfig) -> int:
    """Return how often an update visits each sample."""
    steps, algorithm = config.rollout.steps, ALGORITHMS[config.algorithm.kind](config.algorithm)
    return algorithm.inner_passes(steps, config.window.width(steps) if config.window else 0)


def evaluation_pieces(config: RunConfig) -> int:
    """Return a number that an evaluation's chunks should be a multiple of, as those of a training step are, so that it
    keeps as many samplers busy to its end."""
    chunks = math.ceil(config.images_per_step / config.rollout.chunk)
    return next(pieces for pieces in (8, 4, 2, 1) if chunks % pieces == 0)


@dataclass(frozen=True)
class RewardPool:
    """Describes the workers that score some of the rewards: how many, their resources, and how they get work."""

    name: str
    rewards: tuple[str, ...]
    _: KW_ONLY
    workers: int
    most: int
    cpus: float
    gpus: float = 0.0
    batch: int | None = None
    ordered: bool = True
    pip: tuple[str, ...] = ()

    @property
    def beside(self) -> bool:
        """Return whether the workers share GPUs with samplers."""
        return 0 < self.gpus < HALF


@dataclass(frozen=True)
class Plan:
    """Describes the pools, what each actor takes of a core and of a GPU, and how a step's work is cut.

    config          the run's settings, with all that `settle` fills in
    chunk           images that a sampler draws at once
    micro_batch     images of a learner's micro-batch, each in `fold` of the `inner_passes` at once
    micro_batches   micro-batches of one learner in one update
    rollout_calls   forward passes of the denoiser, each with a whole chunk, that a step's images take
    pieces          chunks of a step, and micro-batches of an update: more samplers or learners than that have no work
    gpus            GPUs that samplers and learners use; `together` samplers share one
    hosts           places where samplers are, which rewards may share
    notes           sentences on settings that could not be followed, or that cost speed
    """

    config: RunConfig
    samplers: int
    most_samplers: int
    learners: int
    reward_pools: tuple[RewardPool, ...]
    threads: int
    sampler_cpus: float
    learner_cpus: float
    sampler_gpus: float
    learner_gpus: float
    gpus: int
    together: int
    hosts: int
    chunk: int
    micro_batch: int
    fold: int
    images_per_step: int
    chunks_per_step: int
    updates_per_step: int
    micro_batches: int
    pieces: tuple[int, int]
    inner_passes: int
    rollout_calls: int
    notes: tuple[str, ...] = ()

    @property
    def reward_workers(self) -> int:
        """Return the number of reward workers in all pools."""
        return sum(pool.workers for pool in self.reward_pools)

    @property
    def rows_per_pass(self) -> int:
        """Return the rows that a learner reads in one forward pass."""
        return self.micro_batch * self.fold

    @property
    def apart(self) -> bool:
        """Return whether a learner rank has its GPU to itself."""
        return self.learner_gpus == 1


def derive(
    config: RunConfig,
    cores: int,
    gpus: int,
    most: Rows = Rows(),  # noqa: B008 - it is frozen
    work: float = 1.0,
) -> Plan:
    """Plan a run on `cores` CPU cores and `gpus` GPUs in all. Counts in `config.cluster` win over derived ones, and
    batches that the config leaves open are settled as `settle` does.

    On CPUs every core gets one sampler and one learner, which alternate in time; on GPUs every GPU does. With
    `loop.ahead` they work at the same time, and share the cores or GPUs out: `work` is what learners do over what
    samplers do in a step. Reward workers that ask for less than half a GPU share one with samplers; the others have
    GPUs of their own. Raises UserError where stated counts cannot work.
    """
    config = settle(config, cores, gpus, most)
    rollout, cluster, notes = config.rollout, config.cluster, []
    lengths, parts = _cut(config)
    chunks = len(lengths)
    per_update = max(Counter(part.update for part in parts).values())

    asked, own = _reward_shares(config), _reward_gpus(config)
    guests = [share for share in asked if 0 < share < HALF]
    if gpus <= own and any(asked):
        raise UserError(
            f"rewards ask for {sum(asked):g} GPUs in their pools, and there are {gpus}, of which training needs one; "
            "lower rewards.<name>.pool.gpus: workers that ask for less than 0.5 share GPUs with training"
        )
    slots = places(config, cores, gpus)
    gpus -= own
    samplers = cluster.samplers or min(slots, chunks)
    learners = cluster.learners or min(slots, per_update)
    if config.loop.ahead:
        samplers, learners = beside(config, slots, "GPUs" if gpus else "cores", (chunks, per_update), work)
    if learners > per_update:
        notes.append(
            f"cluster.learners is {learners}, but an update has {per_update} micro-batches: {per_update} learners start"
        )
        learners = per_update
    most = max(samplers, min(cluster.max_samplers or samplers, chunks))
    if samplers > chunks:
        notes.append(
            f"cluster.samplers is {samplers}, but a step has {chunks} chunks: {samplers - chunks} samplers idle"
        )
    if gpus and learners > gpus:
        raise UserError(
            f"cluster.learners is {learners} with {gpus} GPUs; each learner needs one: set it to {gpus} or less"
        )
    at_once = samplers + learners if config.loop.ahead else max(samplers, learners)
    if not gpus and at_once * cluster.threads > cores:
        notes.append(
            f"{at_once} workers with {cluster.threads} threads share {cores} cores, which costs speed; "
            "leave cluster.samplers and cluster.learners unset"
        )
    if config.backbone.compile and not gpus:
        notes.append("backbone.compile takes minutes before the first step on CPUs; it pays in runs of many hours only")
    beside_each_other = [at_once] * 2 if config.loop.ahead else [samplers, learners]
    sampler_cpus, learner_cpus = (_cpus(config, cores, gpus, count) for count in beside_each_other)
    left = cores - samplers * sampler_cpus - learners * learner_cpus
    return Plan(
        config=config,
        samplers=samplers,
        most_samplers=most,
        learners=learners,
        reward_pools=_reward_pools(config, left, 1.0 if gpus else REST * cluster.threads),
        threads=cluster.threads,
        sampler_cpus=sampler_cpus,
        learner_cpus=learner_cpus,
        **_gpu_shares(
            guests, samplers, learners, gpus, bool(config.loop.ahead or cluster.samplers or cluster.learners)
        ),
        chunk=max(lengths),
        micro_batch=max(part.stop - part.start for part in parts),
        fold=config.learner.fold,
        images_per_step=config.images_per_step,
        chunks_per_step=chunks,
        updates_per_step=config.learner.updates_per_step,
        micro_batches=math.ceil(per_update / learners),
        pieces=(chunks, per_update),
        inner_passes=inner_passes(config),
        rollout_calls=chunks * rollout.steps * (1 if rollout.guidance == 1 else 2),
        notes=tuple(notes),
    )


def _cpus(config: RunConfig, cores: int, gpus: int, count: int) -> float:
    """Return what each of `count` workers that compute at the same time asks for of a core.

    On CPUs a core has whole workers, so that they fit on nodes of any size.
    """
    share, threads = SHARE if config.loop.ahead else TURN, config.cluster.threads
    if gpus:
        return _floor(min(1.0, cores * share / count))
    return _floor(share * threads / math.ceil(count * threads / max(1, cores)))


def _reward_shares(config: RunConfig) -> list[float]:
    """Return what each reward worker with a pool of its reward's own asks for of a GPU."""
    pools = [reward.pool for reward in config.rewards.values() if reward.pool]
    return [pool.gpus for pool in pools for _ in range(pool.workers)]


def _reward_gpus(config: RunConfig) -> int:
    """Return the number of GPUs that reward workers have to themselves, and training has not."""
    return math.ceil(sum(share for share in _reward_shares(config) if share >= HALF))


def chunk_bounds(config: RunConfig) -> list[int]:
    """Return the rows of a step that no chunk may go across: those between updates, where the learner must batch as the
    rollout did."""
    return config.update_bounds if ALGORITHMS[config.algorithm.kind].needs_density else []


def _cut(config: RunConfig) -> tuple[list[int], list[Part]]:
    """Return the lengths of a step's chunks, and their parts that are micro-batches."""
    spans = chunk_spans(config.images_per_step, config.rollout.chunk, chunk_bounds(config))
    lengths = [last - first for first, last in spans]
    return lengths, assign_updates(lengths, config.update_bounds, config.learner.micro_batch)


def _gpu_shares(guests: list[float], samplers: int, learners: int, gpus: int, stated: bool) -> dict[str, float]:
    """Share out GPUs, as fields of a Plan; `guests` are the parts that reward workers on samplers' GPUs want."""
    apart = stated and 0 < samplers + learners <= gpus
    together = 1 if apart or not gpus else math.ceil(samplers / gpus)
    hosts = samplers if apart else max(math.ceil(samplers / together), learners)
    room, load = 1.0 if apart else HALF, max(sum(guests[host::hosts]) for host in range(hosts))
    if room - load < LEAST:
        raise UserError(
            f"rewards ask for {load:g} of a GPU in their pools, and share it with samplers, to whom a learner leaves "
            f"{room:g}; lower rewards.<name>.pool.gpus or workers"
        )
    shares = (_floor((room - load) / together), room) if gpus else (0.0, 0.0)
    return {"sampler_gpus": shares[0], "learner_gpus": shares[1], "gpus": gpus, "together": together, "hosts": hosts}


def _reward_pools(config: RunConfig, left: float, most: float) -> tuple[RewardPool, ...]:
    """Plan one shared pool, and one for each reward with its own. Workers without stated CPUs share what is left."""
    shared = tuple(name for name, reward in config.rewards.items() if reward.pool is None)
    own = {name: reward.pool for name, reward in config.rewards.items() if reward.pool}
    left -= sum(pool.workers * pool.cpus for pool in own.values() if pool.cpus)
    count = (config.cluster.reward_workers if shared else 0) + sum(p.workers for p in own.values() if not p.cpus)
    if left < 1e-4 * count:
        raise UserError(
            "rewards ask for more CPU cores in their pools than samplers and learners leave; lower "
            "rewards.<name>.pool.cpus, or leave it out"
        )
    share = _floor(min(most, left / count)) if count else 0.0
    count = config.cluster.reward_workers
    return (*([RewardPool("shared", shared, workers=count, most=count, cpus=share)] if shared else []),) + tuple(
        RewardPool(
            name,
            (name,),
            workers=pool.workers,
            most=pool.max_workers or pool.workers,
            cpus=pool.cpus or share,
            gpus=pool.gpus,
            batch=pool.batch,
            ordered=pool.batching == "ordered",
            pip=pool.pip,
        )
        for name, pool in own.items()
    )


def _floor(share: float) -> float:
    """Round down to ten-thousandths, in which Ray counts; rounding up would ask for more than there is."""
    return max(1, math.floor(share * 10_000 + 1e-6)) / 10_000


def local_resources() -> tuple[int, int]:
    """Return the numbers of CPU cores and of GPUs that this process may use."""
    import torch

    return cores(), torch.cuda.device_count()


def table(plan: Plan) -> str:
    """Return the plan as text, with one line for each decision."""
    rows = [
        (
            "the next step",
            "is drawn while the learner trains" if plan.config.loop.ahead else "is drawn after the update",
        ),
        ("samplers", f"{_span(plan.samplers, plan.most_samplers)} x {_share(plan.sampler_cpus, plan.sampler_gpus)}"),
        ("learners", f"{plan.learners} x {_share(plan.learner_cpus, plan.learner_gpus)}"),
        *(
            (f"rewards {', '.join(pool.rewards)}", f"{_span(pool.workers, pool.most)} x {_share(pool.cpus, pool.gpus)}")
            for pool in plan.reward_pools
        ),
        ("threads a worker", f"{plan.threads}"),
        ("images a step", f"{plan.images_per_step}, in {plan.chunks_per_step} chunks of {plan.chunk}"),
        ("denoiser calls a step", f"{plan.rollout_calls} in rollouts, each with {plan.chunk} images"),
        ("updates a step", f"{plan.updates_per_step}"),
        (
            "an update",
            f"{plan.micro_batches} micro-batches of {plan.micro_batch} images a learner; each in {plan.inner_passes} "
            f"passes, {plan.fold} at once",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _span(least: int, most: int) -> str:
    return f"{least}" if most == least else f"{least} to {most}"


def _share(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU" + (f", {gpus:g} GPU" if gpus else "")
