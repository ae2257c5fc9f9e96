"""Where plain worker classes become Ray actors."""

from typing import Any

import ray

from align_cluster.config.plan import Plan, RewardPool
from align_cluster.config.run import RunConfig
from align_cluster.rewards.worker import RewardWorker
from align_cluster.rollouts.sampler import Sampler


def make_sampler(config: RunConfig, plan: Plan, place: Any, name: str) -> Any:
    device = "cuda" if plan.sampler_gpus else "cpu"
    shares = {"num_cpus": plan.sampler_cpus, "num_gpus": plan.sampler_gpus}
    actor = ray.remote(Sampler).options(**shares, scheduling_strategy=place)
    return actor.remote(config.backbone, plan.threads, name, device)


def make_reward_worker(config: RunConfig, plan: Plan, pool: RewardPool, place: Any) -> Any:
    actor = ray.remote(RewardWorker).options(num_cpus=pool.cpus, num_gpus=pool.gpus, scheduling_strategy=place)
    rewards = {name: config.rewards[name] for name in pool.rewards}
    return actor.remote(rewards, plan.threads, "cuda" if pool.gpus else "cpu")
