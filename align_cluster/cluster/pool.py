"""A supervised pool of identical workers: what a worker that is lost or hangs had to do goes to its successor."""

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from align_cluster.types import FailureKind, UserError

LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError, RuntimeEnvSetupError)
DEPTH = 2  # calls queued on a worker: the next one is there when the first ends
TRIES = 4  # of a call whose worker is lost


@dataclass
class Call:
    """One unit of work: which method, with what; `returns` splits the result into that many objects."""

    key: Hashable
    method: str
    args: tuple
    returns: int = 1
    losses: int = 0


@dataclass
class Worker:
    """One actor and the calls queued on it, by the reference that is waited for; the first is the one in work.

    `started` is a reference to its start, None once it has come up. `since` is when the call in work began. `spare`
    workers came for a backlog: they get calls when they have come up, and `used` tells whether they got any.
    """

    name: str
    actor: Any
    started: Any
    spare: bool = False
    used: bool = False
    since: float | None = None
    calls: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """A finished call: its first result by value, the others as references."""

    pool: "Pool"
    key: Hashable
    value: Any
    refs: tuple


@dataclass(frozen=True)
class GivenUp:
    """In the place of a result: why there is none."""

    kind: FailureKind
    message: str


@dataclass(frozen=True)
class Patience:
    """With work that may hang or kill its workers: after `deadline_s` of one call its worker is replaced, and after
    `tries` workers the call's result is a GivenUp."""

    deadline_s: float
    tries: int


class Pool:
    """`size` actors, number i made by `make(name, i)`. A call whose worker was lost goes to another one, up to 3 times.

    Errors that the work itself raises are not retried: they rise to the caller as they are. `grow` hires up to `most`
    workers where the cluster has room for them; those have an index of `size` or more.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[str, int], Any],
        size: int,
        timeout_s: float,
        most: int | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.name, self.make, self.size, self.timeout_s = name, make, size, timeout_s
        self.most, self.patience = most or size, patience
        self.waiting: deque[Call] = deque()
        self.sticky: tuple[str, tuple] | None = None
        self.born = self.lost = self.lost_in_a_row = 0
        self.workers = [self._hire(index) for index in range(size)]

    def _hire(self, index: int) -> Worker:
        name = f"{self.name}-{self.born}"
        self.born += 1
        actor = self.make(name, index)
        worker = Worker(name, actor, actor.__ray_ready__.remote(), spare=index >= self.size)
        if self.sticky:
            method, args = self.sticky
            getattr(worker.actor, method).remote(*args)  # actors run calls in order: state first, then work
        return worker

    @property
    def busy(self) -> bool:
        return bool(self.waiting or any(worker.calls for worker in self.workers))

    @property
    def staff(self) -> list[Worker]:
        """Workers that calls may go to."""
        return [worker for worker in self.workers if not (worker.spare and worker.started)]

    @property
    def room(self) -> bool:
        """Whether a call would go to a worker at once."""
        return not self.waiting and any(len(worker.calls) < DEPTH for worker in self.staff)

    def grow(self) -> None:
        """Hire one worker more, unless `most` are there or one is still coming."""
        if len(self.workers) < self.most and all(worker in self.staff for worker in self.workers):
            self.workers.append(self._hire(len(self.workers)))

    def trim(self) -> None:
        """Let those go that `grow` hired and that had nothing to do since the last `trim`."""
        for worker in [worker for worker in self.staff if worker.spare and not (worker.used or worker.calls)]:
            self._drop(worker)
        for worker in self.workers:
            worker.used = False

    def _drop(self, worker: Worker) -> None:
        ray.kill(worker.actor)
        self.workers.remove(worker)

    def submit(self, key: Hashable, method: str, *args: Any, returns: int = 1) -> None:
        """Queue one call; `stream` yields its result."""
        self.waiting.append(Call(key, method, args, returns))
        self._feed()

    def _feed(self) -> None:
        while self.waiting:
            worker = min(self.staff, key=lambda w: len(w.calls))
            if len(worker.calls) >= DEPTH:
                return
            call = self.waiting.popleft()
            worker.used = True
            if not worker.calls and not worker.started:
                worker.since = time.monotonic()
            refs = getattr(worker.actor, call.method).options(num_returns=call.returns).remote(*call.args)
            refs = [refs] if call.returns == 1 else refs
            worker.calls[refs[0]] = (call, tuple(refs[1:]))

    def broadcast(self, method: str, *args: Any, sticky: bool = False) -> list[Any]:
        """Call every worker once and return all results. A `sticky` call is repeated on every later replacement."""
        if sticky:
            self.sticky = (method, args)
        results = []
        for index, worker in enumerate(list(self.workers)):
            results.append((index, getattr(worker.actor, method).remote(*args)))
        return [self._result_of(index, ref, method, args) for index, ref in results]

    def _result_of(self, index: int, ref: Any, method: str, args: tuple) -> Any:
        for _ in range(3):
            try:
                return ray.get(ref, timeout=self.timeout_s)
            except LOST as error:
                self._replace(self.workers[index], error)
                ref = getattr(self.workers[index].actor, method).remote(*args)
            except ray.exceptions.GetTimeoutError as error:
                name = self.workers[index].name
                raise TimeoutError(f"{name} did not answer {method}() within {self.timeout_s:g} s") from error
            except RayTaskError as error:
                raise cause_of(error) from error
        raise RuntimeError(f"{self.name}: three workers in a row were lost during {method}()")

    def _replace(self, worker: Worker, error: Exception) -> list[Done]:
        """Hire a successor and put the lost worker's calls at the head of the queue, in their order; returns what is
        given up. Only the call in work may be to blame."""
        if worker not in self.workers:
            return []
        never_up = isinstance(error, RuntimeEnvSetupError) or getattr(error, "actor_init_failed", False)
        if never_up and not worker.spare:
            raise start_error(worker.name, error) from error
        calls = [call for call, _ in worker.calls.values()]
        if never_up:
            self.most = self.size
            logging.getLogger(__name__).warning("%s does not grow: %s", self.name, start_error(worker.name, error))
        else:
            self.lost, self.lost_in_a_row = self.lost + 1, self.lost_in_a_row + 1
        if self.lost_in_a_row > 3 * self.size + 10:
            raise RuntimeError(
                f"{self.name}: {self.lost_in_a_row} workers lost in a row, the last with: {error}"
            ) from error
        given_up = self._give_up(calls, error)
        self.waiting.extendleft(reversed(calls))
        index = self.workers.index(worker)
        self._drop(worker)
        if not worker.spare:
            self.workers.insert(index, self._hire(index))
        self._feed()
        return given_up

    def _give_up(self, calls: list[Call], error: Exception) -> list[Done]:
        """Take the call in work away where it has lost too many workers."""
        if not calls:
            return []
        calls[0].losses += 1
        if calls[0].losses < (self.patience.tries if self.patience else TRIES):
            return []
        call = calls.pop(0)
        if not self.patience:
            raise RuntimeError(
                f"{self.name}: {call.method}({call.key}) lost its worker {call.losses} times: {error}"
            ) from error
        kind = "timeout" if isinstance(error, TimeoutError) else "unavailable"
        message = f"{self.name} lost {call.losses} workers: {str(error).strip().splitlines()[0]}"
        return [Done(self, call.key, GivenUp(kind, message), ())]

    def collect(self, ref: Any) -> list[Done]:
        """What has come of a reference that is ready."""
        worker = next((w for w in self.workers if ref in w.calls or ref == w.started), None)
        if worker is None:
            return []  # its worker has been replaced meanwhile
        try:
            value = ray.get(ref)
        except LOST as error:
            return self._replace(worker, error)
        except RayTaskError as error:
            raise cause_of(error) from error
        worker.since = time.monotonic()
        if ref == worker.started:
            worker.started = None
            self._feed()
            return []
        call, refs = worker.calls.pop(ref)
        self.lost_in_a_row = 0
        self._feed()
        return [Done(self, call.key, value, refs)]

    def expire(self) -> list[Done]:
        """Replace workers that are over the deadline with the call in work."""
        given_up = []
        for worker in list(self.workers) if self.patience else []:
            late = bool(worker.calls) and worker.since and time.monotonic() - worker.since > self.patience.deadline_s
            if late:
                error = TimeoutError(f"{worker.name} gave no answer in {self.patience.deadline_s:g} s")
                given_up += self._replace(worker, error)
        return given_up

    def shutdown(self) -> None:
        for worker in self.workers:
            ray.kill(worker.actor)
        self.workers = []


def cause_of(error: RayTaskError) -> BaseException:
    """The exception that the remote code raised, of its own type where it has one."""
    return getattr(error, "cause", None) or error


def start_error(name: str, error: RayError) -> Exception:
    """Why a worker could not start. Ray hands over only the text of what its constructor raised, from which a
    UserError is made again."""
    _, found, sentence = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")
    if found:
        return UserError(sentence.strip())
    if isinstance(error, RuntimeEnvSetupError):
        said = re.findall(r"ERROR: (.*)", str(error)) or str(error).strip().splitlines()
        return UserError(f"{name}: its packages cannot be installed ({said[-1].strip()}); correct pool.pip")
    return RuntimeError(f"{name} could not start: {error}")


def stream(*pools: Pool) -> Iterator[Done]:
    """Results of all pools as they come, until nothing is queued or running; new work may be submitted in between.

    Raises TimeoutError, naming who is waited for, when nothing at all has come for the pools' deadline.
    """
    deadline = max(pool.timeout_s for pool in pools)
    tick = min(5.0, deadline, *(pool.patience.deadline_s / 4 for pool in pools if pool.patience))
    heard = time.monotonic()
    while any(pool.busy for pool in pools):
        refs = {
            ref: pool
            for pool in pools
            for worker in pool.workers
            for ref in (*worker.calls, *([worker.started] if worker.started else []))
        }
        ready, _ = ray.wait(list(refs), num_returns=1, timeout=tick)
        found = [done for ref in ready for done in refs[ref].collect(ref)]
        found += [done for pool in pools for done in pool.expire()]
        if ready or found:
            heard = time.monotonic()
        yield from found
        if time.monotonic() - heard > deadline:
            late = [
                f"{worker.name}: {call.method}{call.key}"
                for pool in pools
                for worker in pool.workers
                for call, _ in worker.calls.values()
            ]
            raise TimeoutError(f"nothing finished for {deadline:g} s; waiting for {', '.join(late)}")
