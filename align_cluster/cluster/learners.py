"""The learner's ranks as actors: rendezvous, calls to all at once, one deadline, and a new start where one is lost.

A call is a function of the state after the last update, which the driver holds, and of its arguments. So when a rank is
lost all of them are started anew, take up that state, and the call is made again: the same bits come out.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from align_cluster.cluster.errors import LOST, cause_of, reason
from align_cluster.cluster.pool import whereabouts
from align_cluster.cluster.slots import Doing
from align_cluster.config.plan import Plan
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.learner.state import Snapshot
from align_cluster.learner.worker import Learner

LOSSES = 4  # in a row, without an update in between, that end the run
log = logging.getLogger(__name__)
GRACE_S = 10.0  # after a rank's error: is it only that another one is gone?


class RankLost(RuntimeError):
    """A rank is gone, or did not answer in time."""


class LearnerRank:
    """The actor around a Learner: built in two calls, because the other ranks need rank 0's address first."""

    def address(self) -> tuple[str, int]:
        import socket

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def build(self, *args: Any) -> None:
        self.learner = Learner(*args)

    def restore(self, snapshot: Snapshot) -> None:
        self.learner.restore(snapshot)

    def update(self, *args: Any, **options: Any) -> tuple[Any, Snapshot | None]:
        return self.learner.update(*args, **options), self.learner.state()

    def publish(self, *args: Any) -> Any:
        return self.learner.publish(*args)

    def values(self, *args: Any) -> Any:
        return self.learner.values(*args)


class LearnerGroup:
    """All ranks of one learner. Every call goes to every rank.

    `snapshot` is the state after the last update (None: none has been made). The driver holds it as a view of its own
    node's object store, so it outlives the node that made it. `lost` counts lost ranks.
    """

    def __init__(self, config: RunConfig, plan: Plan, places: list[Any]) -> None:
        self.config, self.plan, self.places, self.timeout_s = config, plan, places, config.cluster.timeout_s
        self.ranks: list[Any] = []
        self.homes: list[str] = []
        self.asked: list[Any] = []  # by whom is waited for, and who of them is left, since when
        self.left: list[Any] = []
        self.since = time.monotonic()
        self.troubles: deque[tuple[float, str]] = deque(maxlen=20)  # with the time of day
        self.built: list[Any] = []
        self.snapshot: Snapshot | None = None
        self.lost = self.lost_in_a_row = 0
        self._survive(self._start)

    def _start(self) -> None:
        """Start all ranks, without waiting until they have loaded their models."""
        self.shutdown()
        plan = self.plan
        actor, shares = ray.remote(LearnerRank), {"num_cpus": plan.learner_cpus, "num_gpus": plan.learner_gpus}
        self.ranks = [actor.options(**shares, scheduling_strategy=place).remote() for place in self.places]
        self.homes = self._wait([rank.__ray_call__.remote(whereabouts) for rank in self.ranks])
        address, port = self._wait([self.ranks[0].address.remote()])[0]
        device = "cuda" if plan.learner_gpus else "cpu"
        self.built = [
            rank.build.remote(self.config.learner_setup, index, plan.learners, address, port, plan.threads, device)
            for index, rank in enumerate(self.ranks)
        ]
        if self.snapshot:
            state = ray.put(self.snapshot)
            self.built += [rank.restore.remote(state) for rank in self.ranks]

    def _survive(self, call: Callable[[], Any]) -> Any:
        """The result of a call; where a rank is lost on the way, all are started anew and the call is made again."""
        while True:
            try:
                if not self.ranks:
                    self._start()
                return call()
            except RankLost as error:
                self.shutdown()
                self.lost, self.lost_in_a_row = self.lost + 1, self.lost_in_a_row + 1
                if self.lost_in_a_row >= LOSSES:
                    raise RuntimeError(
                        f"{self.lost_in_a_row} learner ranks lost in a row, the last: {error}"
                    ) from error
                since = "as it began" if self.snapshot is None else f"from update {self.snapshot.counts['updates']}"
                self.troubles.append((time.time(), f"{error}; the learner starts again {since}"))
                log.warning("%s", self.troubles[-1][1])
                time.sleep(2.0 ** (self.lost_in_a_row - 1) - 1)

    def _call(self, ask: Callable[[], list[Any]]) -> list[Any]:
        return self._survive(lambda: (self._wait(self.built), self._wait(ask()))[1])

    def _wait(self, refs: list) -> list[Any]:
        """Results of one call on every rank. RankLost where one is lost or late."""
        left = list(refs)
        self.asked, self.left, self.since = refs, left, time.monotonic()
        try:
            while left:
                # Any rank's error must surface at once: the others would wait for it in a collective.
                ready, left = ray.wait(left, num_returns=1, timeout=self.timeout_s)
                self.left = left
                if not ready:
                    raise RankLost(f"learner ranks did not finish within {self.timeout_s:g} s: {len(left)} are late")
                ray.get(ready, timeout=self.timeout_s)
            return ray.get(refs, timeout=self.timeout_s)
        except RayTaskError as error:
            cause = cause_of(error)
            if not isinstance(cause, UserError):
                self._blame(left, error)
            raise cause from error
        except LOST as error:
            raise RankLost(f"a learner rank was lost: {reason(error)}") from error
        except GetTimeoutError as error:
            raise RankLost("a learner rank's result did not arrive") from error

    def _blame(self, left: list, error: Exception) -> None:
        """RankLost if an error of one rank comes of another's death, which breaks their collective; Ray may tell of the
        death a little later."""
        until = time.monotonic() + GRACE_S
        while left and time.monotonic() < until:
            ready, left = ray.wait(left, num_returns=1, timeout=until - time.monotonic())
            try:
                ray.get(ready, timeout=self.timeout_s)
            except LOST as lost:
                raise RankLost(f"a learner rank was lost: {reason(lost)}") from error
            except RayTaskError:
                continue

    def ready(self) -> None:
        """Wait until every rank has loaded its model and joined the process group."""
        self._call(list)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a state: of a checkpoint, or an earlier one of this run."""
        self.snapshot = snapshot

        def ask() -> list[Any]:
            state = ray.put(snapshot)
            return [rank.restore.remote(state) for rank in self.ranks]

        self._call(ask)

    def update(self, step: int, shares: list[tuple], totals: dict[int, float], null: Any, actor: bool) -> list[dict]:
        """Run one step on all ranks; `shares` has (pieces, data references) for each."""

        def ask() -> list[Any]:
            return [
                rank.update.remote(step, pieces, totals, null, *data, actor=actor)
                for rank, (pieces, data) in zip(self.ranks, shares, strict=True)
            ]

        answers = self._call(ask)
        self.snapshot, self.lost_in_a_row = answers[0][1], 0
        return [metrics for metrics, _ in answers]

    def values(self, shares: list[list]) -> list[tuple]:
        """What the critic says of each rank's share of records and conditions."""
        return self._call(lambda: [rank.values.remote(*data) for rank, data in zip(self.ranks, shares, strict=True)])

    def critic_state(self) -> dict[str, Any]:
        """The critic's weights after the last update."""
        return self.snapshot.critic()

    def publish(self, source: str, version: int) -> tuple[Any, Any]:
        """(manifest, reference to the flat buffer) of rank 0."""
        buffers = []

        def ask() -> list[Any]:
            pairs = [rank.publish.options(num_returns=2).remote(source, version) for rank in self.ranks]
            buffers.append(pairs[0][1])
            return [manifest for manifest, _ in pairs]

        return self._call(ask)[0], buffers[-1]

    def roster(self) -> list[Doing]:
        """Which ranks have not yet answered. Another thread may ask."""
        left, count = self.left, max(1, len(self.ranks))
        late = {index % count for index, ref in enumerate(self.asked) if ref in left}
        phases = ["at work" if rank in late else "idle" for rank in range(count)]
        return [
            Doing(f"learner-{rank}", home, phase, self.since, rank in late)
            for rank, (home, phase) in enumerate(zip(self.homes, phases, strict=False))
        ]

    def shutdown(self) -> None:
        """End all ranks."""
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []
