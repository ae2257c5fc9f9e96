"""The learner's ranks as one group.

Every call goes to all ranks, with one deadline, and the group starts anew where one rank is lost.

A call is a function of its arguments and of the state after the last update, which the driver holds. So when a rank is
lost, all ranks start anew and take up that state, and the call is made again: the same bits come out.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from align_cluster.cluster.actors import make_learner_rank
from align_cluster.cluster.errors import LOST, WorkersLost, cause_of, reason
from align_cluster.cluster.pool import location_of
from align_cluster.cluster.slots import Span, WorkerStatus
from align_cluster.config.plan import Plan
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.learner.batching import RankMetric, StepWork
from align_cluster.learner.state import Snapshot

MAX_LOSSES = 4  # ranks lost in a row, without an update in between, before the run ends: the fault is then not chance
MOST_SPANS = 1000  # finished calls that the group remembers the times of, at least those of a step
GRACE_S = 10.0  # how long an error of one rank is held back, to learn whether another rank has died and broken it
log = logging.getLogger(__name__)


class RankLost(RuntimeError):
    """A rank has died, or did not answer in time."""


@dataclass(frozen=True)
class RankWork:
    """Pairs one rank's work with references to the records and conditions of its chunks, in turns."""

    work: StepWork
    data: Sequence[Any]


class LearnerGroup:
    """Keeps the ranks of one learner at work.

    `snapshot` is the state after the last update, or None before the first one. The driver holds it in its own node's
    object store, so it outlives the node that made it. `lost` counts lost ranks, and `events` are the last losses, each
    with its time of day. `wait` is how the driver waits for the first of some references, at most for some seconds: it
    may do other work meanwhile. `spans` say when ranks did their last calls.
    """

    def __init__(self, config: RunConfig, plan: Plan, places: list[Any]) -> None:
        self.config, self.plan, self.places = config, plan, places
        self.name = "learner"
        self.timeout_s, self.start_timeout_s = config.cluster.timeout_s, config.cluster.start_timeout_s
        self.ranks: list[Any] = []
        self.locations: list[str] = []
        self.asked: list[Any] = []  # references of the last call, one a rank or several, made `since`
        self.since = time.monotonic()
        self.waiting = False  # whether the driver waits for them
        self.events: deque[tuple[float, str]] = deque(maxlen=20)
        self.spans: deque[Span] = deque(maxlen=MOST_SPANS)
        self.wait: Callable[[list[Any], float], list[Any]] = first_ready
        self.built: list[Any] = []
        self.snapshot: Snapshot | None = None
        self.lost = self.lost_in_a_row = 0
        self._survive(self._start)

    def _start(self) -> None:
        """Start all ranks, without waiting until they have loaded their models."""
        self.shutdown()
        plan = self.plan
        self.ranks = [make_learner_rank(plan, place) for place in self.places]
        self.locations = self._wait([rank.__ray_call__.remote(location_of) for rank in self.ranks], "start_timeout_s")
        address, port = self._wait([self.ranks[0].address.remote()])[0]
        device = "cuda" if plan.learner_gpus else "cpu"
        setup = self.config.learner_setup
        self.built = [
            rank.build.remote(setup, index, plan.learners, address, port, plan.threads, device)
            for index, rank in enumerate(self.ranks)
        ]
        if self.snapshot:
            state = ray.put(self.snapshot)
            self.built += [rank.restore.remote(state) for rank in self.ranks]
        self._note(self.built)

    def _note(self, refs: list[Any]) -> None:
        """Take note of a call that was just made. The driver may wait for it much later, as for loading models."""
        self.asked, self.since = refs, time.monotonic()

    def _survive(self, call: Callable[[], Any]) -> Any:
        """Return a call's result. Where a rank is lost meanwhile, all ranks start anew and the call is made again."""
        while True:
            try:
                if not self.ranks:
                    self._start()
                return call()
            except RankLost as error:
                self.shutdown()
                self.lost, self.lost_in_a_row = self.lost + 1, self.lost_in_a_row + 1
                if self.lost_in_a_row >= MAX_LOSSES:
                    raise WorkersLost(f"{self.lost_in_a_row} learner ranks lost in a row, the last: {error}") from error
                since = "as it began" if self.snapshot is None else f"from update {self.snapshot.counts['updates']}"
                self.events.append((time.time(), f"{error}; the learner starts again {since}"))
                log.warning("%s", self.events[-1][1], extra={"worker": self.name})
                time.sleep(2.0 ** (self.lost_in_a_row - 1) - 1)

    def _call(self, ask: Callable[[], list[Any]]) -> list[Any]:
        def call() -> list[Any]:
            self._wait(self.built, "start_timeout_s")
            return self._wait(ask())

        return self._survive(call)

    def _wait(self, refs: list, setting: str = "timeout_s") -> list[Any]:
        """Return the results of one call on every rank. Raises RankLost where one is lost, or later than a setting."""
        pending, limit_s = list(refs), getattr(self, setting)
        if refs is not self.asked:
            self._note(refs)
        self.waiting = True
        try:
            while pending:
                # Any rank's error must surface at once: the others would wait for that rank in a collective.
                ready = self.wait(pending, limit_s)
                pending = [ref for ref in pending if ref not in ready]
                if not ready:
                    doing = "finish" if setting == "timeout_s" else "load their model"
                    raise RankLost(
                        f"{len(pending)} of {len(refs)} learner ranks did not {doing} within the {limit_s:g} s of "
                        f"cluster.{setting}"
                    )
                ray.get(ready, timeout=self.timeout_s)
            if self.ranks and refs is not self.built:
                self.spans += [Span(f"learner-{i}", "learn", self.since, time.monotonic()) for i in range(len(refs))]
            return ray.get(refs, timeout=self.timeout_s)
        except RayTaskError as error:
            cause = cause_of(error)
            if not isinstance(cause, UserError):
                self._blame(pending, error)
            raise cause from error
        except LOST as error:
            raise RankLost(f"a learner rank was lost: {reason(error)}") from error
        except GetTimeoutError as error:
            raise RankLost("a learner rank's result did not arrive") from error
        finally:
            self.waiting = False

    def _blame(self, pending: list, error: Exception) -> None:
        """Raise RankLost if one rank's error comes of another rank's death, which breaks their collective.

        Ray may tell of the death a little later than of the error.
        """
        until = time.monotonic() + GRACE_S
        while pending and time.monotonic() < until:
            ready, pending = ray.wait(pending, num_returns=1, timeout=until - time.monotonic())
            try:
                ray.get(ready, timeout=self.timeout_s)
            except LOST as lost:
                raise RankLost(f"a learner rank was lost: {reason(lost)}") from error
            except RayTaskError:
                continue

    def ready(self) -> None:
        """Wait until every rank has loaded its model and joined the process group."""
        self._survive(lambda: self._wait(self.built, "start_timeout_s"))

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from the state of a checkpoint, or from an earlier one of this run."""
        self.snapshot = snapshot

        def ask() -> list[Any]:
            state = ray.put(snapshot)
            return [rank.restore.remote(state) for rank in self.ranks]

        self._call(ask)

    def update(self, shares: Sequence[RankWork], null: Any) -> list[dict[str, RankMetric]]:
        """Train one step on all ranks and return each one's metrics; `null` is a reference or None."""

        def ask() -> list[Any]:
            return [
                rank.update.remote(share.work, null, *share.data)
                for rank, share in zip(self.ranks, shares, strict=True)
            ]

        answers = self._call(ask)
        self.snapshot, self.lost_in_a_row = answers[0][1], 0
        return [metrics for metrics, _ in answers]

    def values(self, shares: Sequence[Sequence[Any]]) -> list[tuple]:
        """Return the critic's values of each rank's records and conditions, which are given in turns."""
        return self._call(lambda: [rank.values.remote(*data) for rank, data in zip(self.ranks, shares, strict=True)])

    def critic_state(self) -> dict[str, Any]:
        """Return the critic's weights after the last update."""
        return self.snapshot.critic()

    def publish(self, source: str, version: int) -> tuple[Any, Any]:
        """Return the manifest and a reference to the flat buffer of rank 0."""
        buffers = []

        def ask() -> list[Any]:
            pairs = [rank.publish.options(num_returns=2).remote(source, version) for rank in self.ranks]
            buffers.append(pairs[0][1])
            return [manifest for manifest, _ in pairs]

        return self._call(ask)[0], buffers[-1]

    def work(self, since: float) -> list[Span]:
        """Return the spans of work that ended after `since` (monotonic seconds)."""
        return [span for span in self.spans if span.end > since]

    def status(self) -> list[WorkerStatus]:
        """Say which ranks have not yet answered, and since when they were asked. Another thread may call it."""
        asked, count, work = self.asked, max(1, len(self.ranks)), "at work"
        if asked is self.built:
            work = "loading its model"
        pending = ray.wait(asked, num_returns=len(asked), timeout=0, fetch_local=False)[1] if asked else []
        busy = {index % count for index, ref in enumerate(asked) if ref in pending}
        return [
            WorkerStatus(
                f"learner-{rank}", location, work if rank in busy else "idle", self.since, self.waiting and rank in busy
            )
            for rank, location in enumerate(self.locations)
        ]

    def shutdown(self) -> None:
        """End all ranks."""
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []


def first_ready(refs: list[Any], seconds: float) -> list[Any]:
    """Wait at most `seconds` for the first of some references to be ready, and return it in a list."""
    return ray.wait(refs, num_returns=1, timeout=seconds)[0]
