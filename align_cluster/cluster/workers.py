"""Where plain worker classes become Ray actors."""

from typing import Any

import ray

from align_cluster.config.plan import Plan
from align_cluster.config.run import RunConfig
from align_cluster.rewards.worker import RewardWorker
from align_cluster.rollouts.sampler import Sampler


def make_sampler(config: RunConfig, plan: Plan, name: str) -> Any:
    device = "cuda" if plan.sampler_gpus else "cpu"
    actor = ray.remote(Sampler).options(num_cpus=plan.sampler_cpus, num_gpus=plan.sampler_gpus)
    return actor.remote(config.backbone, plan.threads, name, device)


def make_reward_worker(config: RunConfig, plan: Plan, name: str) -> Any:
    return ray.remote(RewardWorker).options(num_cpus=plan.reward_cpus).remote(dict(config.rewards), plan.threads)
