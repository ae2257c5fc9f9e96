"""Where plain worker classes become Ray actors."""

from typing import Any

import ray

from align_cluster.config.plan import Plan, RewardPool
from align_cluster.config.run import RunConfig
from align_cluster.rewards.worker import RewardWorker
from align_cluster.rollouts.sampler import Sampler


def make_sampler(config: RunConfig, plan: Plan, place: Any, name: str) -> Any:
    """`place: None` is wherever the cluster has room."""
    device = "cuda" if plan.sampler_gpus else "cpu"
    shares = {"num_cpus": plan.sampler_cpus, "num_gpus": plan.sampler_gpus}
    actor = ray.remote(Sampler).options(**shares, scheduling_strategy=place or "DEFAULT")
    return actor.remote(config.backbone, plan.threads, name, device, config.rollout.merge_lora)


def make_reward_worker(config: RunConfig, plan: Plan, pool: RewardPool, place: Any) -> Any:
    """`place: None` is wherever the cluster has room."""
    options = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "scheduling_strategy": place or "DEFAULT"}
    if pool.pip:
        options["runtime_env"] = {"pip": list(pool.pip)}
    rewards = {name: config.rewards[name] for name in pool.rewards}
    device = "cuda" if pool.gpus else "cpu"
    return ray.remote(RewardWorker).options(**options).remote(rewards, plan.threads, device, pool.batch)
