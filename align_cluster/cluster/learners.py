"""The learner's ranks as actors: rendezvous, calls to all ranks at once, one deadline."""

import time
from collections import deque
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from align_cluster.cluster.pool import LOST, Doing, cause_of
from align_cluster.config.plan import Plan
from align_cluster.config.run import RunConfig
from align_cluster.learner.worker import Learner


class LearnerRank:
    """The actor around a Learner: built in two calls, because the other ranks need rank 0's address first."""

    def address(self) -> tuple[str, int]:
        import socket

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def build(self, *args: Any) -> None:
        self.learner = Learner(*args)

    def update(self, *args: Any, **options: Any) -> Any:
        return self.learner.update(*args, **options)

    def publish(self, *args: Any) -> Any:
        return self.learner.publish(*args)

    def values(self, *args: Any) -> Any:
        return self.learner.values(*args)

    def critic_state(self) -> Any:
        return self.learner.critic_state()


class LearnerGroup:
    """All ranks of one learner. Every call goes to every rank."""

    def __init__(self, config: RunConfig, plan: Plan, places: list[Any]) -> None:
        self.timeout_s = config.cluster.timeout_s
        self.asked: list[Any] = []
        self.left: list[Any] = []
        self.since = time.monotonic()
        self.troubles: deque[tuple[float, str]] = deque(maxlen=20)  # with the time of day
        actor, shares = ray.remote(LearnerRank), {"num_cpus": plan.learner_cpus, "num_gpus": plan.learner_gpus}
        self.ranks = [actor.options(**shares, scheduling_strategy=place).remote() for place in places]
        address, port = self.wait([self.ranks[0].address.remote()])[0]
        device = "cuda" if plan.learner_gpus else "cpu"
        self.built = [
            rank.build.remote(config, index, plan.learners, address, port, plan.threads, device)
            for index, rank in enumerate(self.ranks)
        ]

    def wait(self, refs: list) -> list[Any]:
        """Results of one call on every rank; names the rank that is lost or late."""
        left = list(refs)
        self.asked, self.left, self.since = refs, left, time.monotonic()
        try:
            while left:
                # Any rank's error must surface at once: the others would wait for it in a collective.
                ready, left = ray.wait(left, num_returns=1, timeout=self.timeout_s)
                self.left = left
                if not ready:
                    raise TimeoutError(
                        f"learner ranks did not finish within {self.timeout_s:g} s: {len(left)} are late"
                    )
                ray.get(ready)
            return ray.get(refs)
        except RayTaskError as error:
            raise cause_of(error) from error
        except LOST as error:
            raise RuntimeError(f"a learner rank was lost: {error}") from error
        except GetTimeoutError as error:
            raise TimeoutError("a learner rank's result did not arrive") from error

    def ready(self) -> None:
        """Wait until every rank has loaded its model and joined the process group."""
        self.wait(self.built)

    def update(self, step: int, shares: list[tuple], totals: dict[int, float], null: Any, actor: bool) -> list[dict]:
        """Run one step on all ranks; `shares` has (pieces, data references) for each."""
        refs = [
            rank.update.remote(step, pieces, totals, null, *data, actor=actor)
            for rank, (pieces, data) in zip(self.ranks, shares, strict=True)
        ]
        return self.wait(refs)

    def values(self, shares: list[list]) -> list[tuple]:
        """What the critic says of each rank's share of records and conditions."""
        return self.wait([rank.values.remote(*data) for rank, data in zip(self.ranks, shares, strict=True)])

    def critic_state(self) -> dict[str, Any]:
        """The critic's weights, which are the same on all ranks."""
        return self.wait([self.ranks[0].critic_state.remote()])[0]

    def publish(self, source: str, version: int) -> tuple[Any, Any]:
        """(manifest, reference to the flat buffer) of rank 0."""
        pairs = [rank.publish.options(num_returns=2).remote(source, version) for rank in self.ranks]
        manifest, *_ = self.wait([manifest for manifest, _ in pairs])
        return manifest, pairs[0][1]

    def roster(self) -> list[Doing]:
        """Which ranks have not yet answered. Another thread may ask."""
        left, count = self.left, max(1, len(self.ranks))
        late = {index % count for index, ref in enumerate(self.asked) if ref in left}
        phases = ["at work" if rank in late else "idle" for rank in range(count)]
        return [Doing(f"learner-{rank}", "", phase, self.since, rank in late) for rank, phase in enumerate(phases)]

    def shutdown(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
