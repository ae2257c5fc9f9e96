"""Joins Ray, and refuses at once what the cluster cannot hold."""

import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import In, NodeLabelSchedulingStrategy, PlacementGroupSchedulingStrategy

from align_cluster.cluster import private
from align_cluster.cluster.checks import token_problem
from align_cluster.cluster.pool import fetch
from align_cluster.cluster.preload import Preload
from align_cluster.config.plan import HALF, Plan, Rows, derive
from align_cluster.config.run import ClusterConfig, RunConfig
from align_cluster.errors import UserError

ANYWHERE = "anywhere"
FULL = ("OutOfDiskError", "ObjectStoreFullError")  # Ray's errors; their text may stand inside another error's
NODE_ID = "ray.io/node-id"  # the label with which Ray marks each node
PATIENCE_S = 5.0  # a run that has just ended returns its resources within about a second, on a busy machine later


@contextmanager
def cluster(config: ClusterConfig, preload: Preload | None = None) -> Iterator[None]:
    """Connect to Ray for the length of a run: a private Ray on this machine, or the cluster at `config.address`.

    A private Ray forks its workers from the process of `preload`, if it is given.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    joined, started = ray.is_initialized(), False
    if not joined:
        handler = signal.getsignal(signal.SIGTERM)
        started = connect(config.address or os.environ.get("RAY_ADDRESS") or "local", preload)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own, which exits on the spot
    try:
        with private.watched() if started else nullcontext():
            yield
    except Exception as error:
        if any(name in f"{type(error).__name__} {error}" for name in FULL):
            raise UserError(
                "Ray's object store is full, and so is the disk that it spills to: free space where Ray's session "
                "folder is (/tmp/ray unless set), start the nodes with more --object-store-memory, or draw less at a "
                "time (prompts_per_step, rollout.group_size)"
            ) from error
        if isinstance(error, TimeoutError):
            raise UserError(f"{error}; `align-cluster doctor RUN` shows more") from error
        raise
    finally:
        if not joined:
            ray.shutdown()


def connect(address: str, preload: Preload | None = None) -> bool:
    """Start a private Ray for the address "local", or join the cluster at `address`, and tell whether it is private.

    Raises UserError where that fails.
    """
    quiet = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    ray._private.worker.print_to_stdstream = _first_lines
    _note_uv()
    if address == "local":
        private.start(preload.used_by_ray if preload else nullcontext, **quiet)
        return True
    if os.environ.get("RAY_AUTH_MODE") == "token" and (problem := token_problem()):
        raise UserError(
            f"cluster.address: no token for the Ray at {address}: {problem}, or set RAY_AUTH_MODE=disabled where that "
            "cluster asks for none"
        )
    try:
        with private.loopback_only() if private.is_private(address) else nullcontext():
            ray.init(address=address, **quiet)
        return False
    except Exception as error:  # Ray has many for this, bare ones among them
        if told := re.search(r"cluster was started with:\s+Ray: (\S+)\s+Python: (\S+)", str(error)):
            raise UserError(
                f"cluster.address: the cluster at {address} runs Ray {told[1]} and Python {told[2]}, and here are "
                f"Ray {ray.__version__} and Python {platform.python_version()}; install here what the cluster has, or "
                "start the run there with `align-cluster submit`"
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cluster.address: no Ray cluster answers at {address!r} ({reason}); `align-cluster doctor` shows more"
        ) from error


def _note_uv() -> None:
    """Say under `uv run` that its hook in Ray is off, which would ship the working directory, runs and models too."""
    from ray._private import ray_constants
    from ray._private.runtime_env.uv_runtime_env_hook import _get_uv_run_cmdline

    if not ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV and _get_uv_run_cmdline():
        _say_once("under `uv run`, workers use this environment; the working directory is not shipped to them")


@cache
def _say_once(text: str) -> None:
    print(f"ray: {text}", file=sys.stderr, flush=True)


def _first_lines(data: dict[str, Any], **_: Any) -> None:
    """Print the first line of each message that Ray has for this process; what follows is its nodes' state and logs."""
    for text in data["lines"]:
        _say_once(text.strip().partition("\n")[0])


def nodes(names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return Ray's entries of the cluster's living nodes: those with these names, addresses or ids, or for None all.

    Raises UserError where the cluster has no such node.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    if names is None:
        return alive
    keys = ("NodeID", "NodeName", "NodeManagerHostname", "NodeManagerAddress")
    for name in names:
        if not any(name == node[key] for node in alive for key in keys):
            there = ", ".join(f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in alive)
            raise UserError(f"cluster.nodes: the cluster has no node {name!r}; it has {there}")
    return [node for node in alive if any(node[key] in names for key in keys)]


def resources(config: ClusterConfig) -> tuple[int, int]:
    """Return (CPU cores, GPUs) of all nodes that a run may use."""
    total = _summed([node["Resources"] for node in nodes(config.nodes)])
    return int(total["CPU"]), int(total["GPU"])


def _summed(resources: Sequence[dict[str, float]]) -> dict[str, float]:
    return {kind: sum(own.get(kind, 0.0) for own in resources) for kind in ("CPU", "GPU")}


def anywhere(config: ClusterConfig) -> Any:
    """Return how Ray places what has no place of its own: on a node that the run may use, or for None on any."""
    if config.nodes is None:
        return None
    return NodeLabelSchedulingStrategy(hard={NODE_ID: In(*(node["NodeID"] for node in nodes(config.nodes)))})


def plan_run(config: RunConfig, cores: int, gpus: int) -> Plan:
    """Plan a run on the cluster's cores and GPUs.

    Batches that it leaves open are chosen by the memory of a GPU, and pools that work at the same time by their work.
    """
    rows, free = Rows(), _free(config.cluster)["GPU"] > 0.01  # without a free one, `reserve` says so
    if not (free or config.loop.ahead):
        return derive(config, cores, gpus)
    # Here, because it imports networks, for which other runs on CPUs need not wait.
    from align_cluster.planner.batches import rows_that_fit
    from align_cluster.planner.work import learner_work

    if free:
        rows = rows_that_fit(config, cores, gpus, gpu_memory(config.cluster))
    return derive(config, cores, gpus, rows, learner_work(config, cores, gpus, rows))


def _free(config: ClusterConfig) -> dict[str, float]:
    """Return what is free of the nodes that a run may use."""
    free = ray._private.state.available_resources_per_node()
    return _summed([free.get(node["NodeID"], {}) for node in nodes(config.nodes)])


def gpu_memory(config: ClusterConfig) -> float:
    """Return the bytes of one of the run's GPUs, as a worker there sees it."""
    task = ray.remote(num_cpus=0, num_gpus=0.01, scheduling_strategy=anywhere(config) or "DEFAULT")(_memory_here)
    return fetch(task.remote(), config.timeout_s)


def _memory_here() -> float:
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory)


def reward_role(pool: str) -> str:
    """Return the name under which the places of a reward pool's workers are kept."""
    return f"reward {pool}"


def slots(plan: Plan) -> tuple[list[dict[str, float]], dict[str, list[int]]]:
    """Return what the run reserves: bundles of resources, and for each role which bundle its worker number i runs in.

    Samplers and a learner rank that take turns share a bundle, and with it a GPU. Reward workers that ask for a small
    part of a GPU share it too. A bundle with a learner holds a whole GPU, because Ray would put two halves on the same
    device, where NCCL refuses two ranks.
    """
    first_learner = plan.samplers if plan.apart or plan.config.loop.ahead else 0
    places = {
        "sampler": [index // plan.together for index in range(plan.samplers)],
        "learner": [first_learner + index for index in range(plan.learners)],
    }
    bundles: list[dict[str, float]] = [{"CPU": 0.0} for _ in range(1 + max(places["sampler"] + places["learner"]))]
    cpus = {"sampler": plan.sampler_cpus, "learner": plan.learner_cpus}
    for role, indices in places.items():
        for index in indices:
            bundles[index]["CPU"] = round(bundles[index]["CPU"] + cpus[role], 4)
    if plan.gpus:
        for index, bundle in enumerate(bundles):
            bundle["GPU"] = 1.0 if plan.apart or index in places["learner"] else HALF
    guests = 0
    for pool in plan.reward_pools:
        if pool.beside:
            places[reward_role(pool.name)] = [(guests + index) % plan.hosts for index in range(pool.workers)]
            guests += pool.workers
            for index in places[reward_role(pool.name)]:
                bundles[index]["CPU"] = round(bundles[index]["CPU"] + pool.cpus, 4)
        else:
            places[reward_role(pool.name)] = list(range(len(bundles), len(bundles) + pool.workers))
            bundles += [{"CPU": pool.cpus} | ({"GPU": pool.gpus} if pool.gpus else {}) for _ in range(pool.workers)]
    return bundles, places


@contextmanager
def reserve(plan: Plan) -> Iterator[dict[str, list[Any]]]:
    """Reserve the run's share of the cluster, whole or not at all; yield for each role where worker number i runs, and
    as ANYWHERE where further workers may.

    Raises UserError, which names what is missing, where the cluster does not have it, or where others hold it and do
    not give it back within seconds.
    """
    bundles, places = slots(plan)
    config = plan.config.cluster
    usable = nodes(config.nodes)
    total, free = _summed([node["Resources"] for node in usable]), _free(config)
    need = {key: sum(bundle.get(key, 0) for bundle in bundles) for key in ("CPU", "GPU")}
    fits = all(count <= total[key] + 1e-6 for key, count in need.items())
    only = {NODE_ID: f"in({','.join(node['NodeID'] for node in usable)})"} if config.nodes else {}
    selector = [only] * len(bundles) if only else None
    group = placement_group(bundles, strategy="PACK", bundle_label_selector=selector) if fits else None
    try:
        if group is None or not group.wait(PATIENCE_S):
            short = [
                f"{count:g} {key} ({total[key]:g} in all, {free[key]:g} free)"
                for key, count in need.items()
                if count > free[key] + 1e-6
            ]
            where = f"the cluster lacks on {', '.join(config.nodes)}" if config.nodes else "the cluster lacks"
            raise UserError(
                f"{where} {' and '.join(short) or f'nodes that hold all of {bundles}'} for {plan.samplers} "
                f"samplers, {plan.learners} learners and {plan.reward_workers} reward workers: lower cluster.samplers, "
                "cluster.learners or cluster.reward_workers, add nodes, or wait for other jobs to end"
            )
        yield {
            role: [PlacementGroupSchedulingStrategy(group, index) for index in indices]
            for role, indices in places.items()
        } | {ANYWHERE: [anywhere(config)]}
    finally:
        if group is not None:
            remove_placement_group(group)
