"""Joining Ray, and refusing at once what the cluster cannot hold."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from align_cluster.config.plan import Plan
from align_cluster.config.run import ClusterConfig
from align_cluster.types import UserError


@contextmanager
def cluster(config: ClusterConfig) -> Iterator[None]:
    """A Ray connection for the length of a run: a private Ray on this machine, or the cluster at `config.address`."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    joined = ray.is_initialized()
    if not joined:
        quiet = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
        address = config.address or os.environ.get("RAY_ADDRESS") or "local"
        own = {"num_cpus": os.cpu_count(), "include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, **own, **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            where = "a Ray on this machine did not start" if own else f"no Ray cluster answers at {address!r}"
            raise UserError(f"cluster.address: {where} ({reason}); `align-cluster doctor` shows more") from error
    try:
        yield
    finally:
        if not joined:
            ray.shutdown()


def resources() -> tuple[int, int]:
    """(CPU cores, GPUs) of the whole cluster."""
    total = ray.cluster_resources()
    return int(total.get("CPU", 0)), int(total.get("GPU", 0))


def check_fits(plan: Plan) -> None:
    """Raise UserError, naming what is missing, where the free resources cannot hold the plan's workers."""
    need = {
        "CPU": plan.samplers * plan.sampler_cpus
        + plan.learners * plan.learner_cpus
        + plan.reward_workers * plan.reward_cpus,
        "GPU": plan.samplers * plan.sampler_gpus + plan.learners * plan.learner_gpus,
    }
    free = ray.available_resources()
    short = [f"{need[key]:g} {key} (free: {free.get(key, 0):g})" for key in need if need[key] > free.get(key, 0) + 1e-6]
    if short:
        raise UserError(
            f"the cluster lacks {' and '.join(short)} for {plan.samplers} samplers, {plan.learners} learners and "
            f"{plan.reward_workers} reward workers: lower cluster.samplers, cluster.learners or "
            "cluster.reward_workers, or add nodes"
        )
