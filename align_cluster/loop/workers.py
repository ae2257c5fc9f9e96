"""All workers of one run, and the parts that put them to work."""

from types import TracebackType
from typing import Any

from align_cluster.cluster.actors import make_reward_worker, make_sampler
from align_cluster.cluster.learners import LearnerGroup
from align_cluster.cluster.placement import ANYWHERE, reward_role
from align_cluster.cluster.pool import Pool
from align_cluster.cluster.slots import RetryPolicy
from align_cluster.config.plan import Plan, RewardPool
from align_cluster.config.run import RunConfig
from align_cluster.loop.conditions import ConditionStore
from align_cluster.loop.learning import LearnerClient
from align_cluster.loop.rollouts import Report, RolloutCollector
from align_cluster.loop.syncing import WeightSync


class WorkerGroup:
    """Starts samplers, reward workers and learner ranks; leaving the context ends them all.

    `rollouts` draws and scores, `learner` trains, `weights` syncs, `conditions` encodes. `progress` is (done, total) of
    each stage, for people who look at the run.
    """

    def __init__(self, config: RunConfig, plan: Plan, places: dict[str, list[Any]], report: Report) -> None:
        self.plan, self.show = plan, report
        self.progress: dict[str, tuple[int, int]] = {}
        self.idle: dict[str, float] = {}  # share of the last step that each kind of worker waited
        self.lost_before = 0  # workers that a resumed run lost earlier
        self.samplers = _sampler_pool(config, plan, places)
        self.rewards = [_reward_pool(config, plan, pool, places) for pool in plan.reward_pools]
        self.ranks = LearnerGroup(config, plan, places["learner"])
        self.conditions = ConditionStore(config, self.samplers)
        self.weights = WeightSync(config.cluster.timeout_s, self.samplers, self.ranks, config.loop.ahead)
        rewards = list(zip(self.rewards, plan.reward_pools, strict=True))
        self.rollouts = RolloutCollector(config, self.samplers, rewards, self.conditions, self.weights, self.report)
        self.learner = LearnerClient(config, plan, self.ranks, self.conditions, self.rollouts, self.weights)
        self.ranks.wait = self.rollouts.wait_beside

    def report(self, stage: str, done: int, total: int) -> None:
        """Take note of how far a stage has come."""
        self.progress[stage] = (done, total)
        self.show(stage, done, total)

    @property
    def groups(self) -> list[Pool | LearnerGroup]:
        """Return everything that has workers."""
        return [self.samplers, *self.rewards, self.ranks]

    @property
    def lost(self) -> int:
        """Count the workers of all kinds that were lost since the run began."""
        return self.lost_before + sum(group.lost for group in self.groups)

    def __enter__(self) -> "WorkerGroup":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for group in self.groups:
            group.shutdown()


def _place(places: dict[str, list[Any]], role: str, index: int) -> Any:
    """Return where worker number `index` of a role runs: at its own place, or anywhere beyond these."""
    own = places[role]
    return own[index] if index < len(own) else places[ANYWHERE][0]


def _sampler_pool(config: RunConfig, plan: Plan, places: dict[str, list[Any]]) -> Pool:
    def make(name: str, index: int) -> Any:
        return make_sampler(config, plan, _place(places, "sampler", index), name)

    return Pool("sampler", make, plan.samplers, config.cluster.timeout_s, plan.most_samplers)


def _reward_pool(config: RunConfig, plan: Plan, pool: RewardPool, places: dict[str, list[Any]]) -> Pool:
    def make(name: str, index: int) -> Any:
        return make_reward_worker(config, plan, pool, _place(places, reward_role(pool.name), index))

    policies = [config.rewards[name].on_failure for name in pool.rewards]
    retry = RetryPolicy(sum(p.timeout_s for p in policies), 1 + max(p.retries for p in policies))
    return Pool(f"reward {pool.name}", make, pool.workers, config.cluster.timeout_s, pool.most, retry)
