"""A supervised pool of identical workers: work is reissued when a worker is lost, lost workers are replaced."""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError

from align_cluster.types import UserError

LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError)
DEPTH = 2  # calls queued on a worker: the next one is there when the first ends


@dataclass
class Call:
    """One unit of work: which method, with what; `returns` splits the result into that many objects."""

    key: Hashable
    method: str
    args: tuple
    returns: int = 1
    attempts: int = 0


@dataclass
class Worker:
    """One actor, the calls queued on it (by the reference that is waited for), and how it was brought up to date."""

    name: str
    actor: Any
    calls: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """A finished call: its first result by value, the others as references."""

    pool: "Pool"
    key: Hashable
    value: Any
    refs: tuple


class Pool:
    """`size` actors, number i made by `make(name, i)`. A call whose worker was lost goes to another one, up to 3 times.

    Errors that the work itself raises are not retried: they rise to the caller as they are.
    """

    def __init__(self, name: str, make: Callable[[str, int], Any], size: int, timeout_s: float) -> None:
        self.name, self.make, self.size, self.timeout_s = name, make, size, timeout_s
        self.waiting: deque[Call] = deque()
        self.sticky: tuple[str, tuple] | None = None
        self.born = self.lost = 0
        self.workers = [self._hire(index) for index in range(size)]

    def _hire(self, index: int) -> Worker:
        name = f"{self.name}-{self.born}"
        self.born += 1
        worker = Worker(name, self.make(name, index))
        if self.sticky:
            method, args = self.sticky
            getattr(worker.actor, method).remote(*args)  # actors run calls in order: state first, then work
        return worker

    @property
    def busy(self) -> bool:
        return bool(self.waiting or any(worker.calls for worker in self.workers))

    def submit(self, key: Hashable, method: str, *args: Any, returns: int = 1) -> None:
        """Queue one call; `stream` yields its result."""
        self.waiting.append(Call(key, method, args, returns))
        self._feed()

    def _feed(self) -> None:
        while self.waiting:
            worker = min(self.workers, key=lambda w: len(w.calls))
            if len(worker.calls) >= DEPTH:
                return
            call = self.waiting.popleft()
            call.attempts += 1
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

    def _replace(self, worker: Worker, error: RayError) -> None:
        """Hire a successor and put the lost worker's calls at the head of the queue, in their order."""
        if worker not in self.workers:
            return
        if getattr(error, "actor_init_failed", False):
            raise start_error(worker.name, error) from error
        self.lost += 1
        if self.lost > 3 * self.size + 10:
            raise RuntimeError(f"{self.name}: {self.lost} workers lost, the last with: {error}") from error
        for call, _ in reversed(worker.calls.values()):
            if call.attempts >= 4:
                raise RuntimeError(
                    f"{self.name}: {call.method}({call.key}) lost its worker 4 times: {error}"
                ) from error
            self.waiting.appendleft(call)
        ray.kill(worker.actor)
        index = self.workers.index(worker)
        self.workers[index] = self._hire(index)
        self._feed()

    def _collect(self, ref: Any) -> Done | None:
        worker = next(w for w in self.workers if ref in w.calls)
        try:
            value = ray.get(ref)
        except LOST as error:
            self._replace(worker, error)
            return None
        except RayTaskError as error:
            raise cause_of(error) from error
        call, refs = worker.calls.pop(ref)
        self._feed()
        return Done(self, call.key, value, refs)

    def shutdown(self) -> None:
        for worker in self.workers:
            ray.kill(worker.actor)
        self.workers = []


def cause_of(error: RayTaskError) -> BaseException:
    """The exception that the remote code raised, of its own type where it has one."""
    return getattr(error, "cause", None) or error


def start_error(name: str, error: RayError) -> Exception:
    """What a worker's constructor raised. Ray hands over only its text, from which a UserError is made again."""
    _, found, sentence = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")
    return UserError(sentence.strip()) if found else RuntimeError(f"{name} could not start: {error}")


def stream(*pools: Pool) -> Iterator[Done]:
    """Results of all pools as they come, until nothing is queued or running; new work may be submitted in between.

    Raises TimeoutError, naming who is waited for, when nothing at all has come for the pools' deadline.
    """
    deadline = max(pool.timeout_s for pool in pools)
    heard = time.monotonic()
    while any(pool.busy for pool in pools):
        refs = {ref: pool for pool in pools for worker in pool.workers for ref in worker.calls}
        ready, _ = ray.wait(list(refs), num_returns=1, timeout=min(5.0, deadline))
        for ref in ready:
            heard = time.monotonic()
            done = refs[ref]._collect(ref)
            if done is not None:
                yield done
        if not ready and time.monotonic() - heard > deadline:
            late = [
                f"{worker.name}: {call.method}{call.key}"
                for pool in pools
                for worker in pool.workers
                for call, _ in worker.calls.values()
            ]
            raise TimeoutError(f"nothing finished for {deadline:g} s; waiting for {', '.join(late)}")
