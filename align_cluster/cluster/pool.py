"""A supervised pool of identical workers. Another worker does what a lost or hanging one had to do."""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayTaskError, RuntimeEnvSetupError

from align_cluster.cluster.errors import LOST, WorkersLost, cause_of, reason, start_error
from align_cluster.cluster.slots import Call, GivenUp, InputLost, RetryPolicy, Slot, Span, Worker, WorkerStatus

DEPTH = 2  # calls queued on a worker, so that the next one is there when the first ends
MAX_TRIES = 4  # workers that one call may lose before the run ends: a call that kills its worker would kill them all
MAX_LATE_TRIES = 2  # times that one call may be late before the run ends, each as long as the pool's deadline
BACKOFF_S = 0.5  # pause before the third worker of a slot; each later pause is twice as long
MOST_SPANS = 10_000  # finished calls that a pool remembers the times of: those of a step, however many chunks it has
QUARANTINE_S = 300.0  # how long a slot is left alone after MAX_FAILURES: time for a node to be mended
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """Holds a finished call: its first result by value, the others as references."""

    pool: "Pool"
    key: Hashable
    value: Any
    refs: tuple


class Pool:
    """Keeps `size` actors at work; `make(name, i)` makes number i. A call whose worker was lost goes to another one.

    The pool restarts a lost worker at once, then after 0.5, 1 and 2 s. After MAX_FAILURES in a row it quarantines the
    slot for QUARANTINE_S, and the other workers do the work. It does not retry errors that the work itself raises: they
    rise to the caller as they are. `grow` adds workers, up to `max_size`, where the cluster has room for them; their
    index is `size` or more. `verify` raises where an answer to a broadcast is not what it must be. `events` are the
    last losses, each with its time of day, and `spans` say when workers did their last calls.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[str, int], Any],
        size: int,
        timeout_s: float,
        max_size: int | None = None,
        retry_policy: RetryPolicy | None = None,
        verify: Callable[[Any], None] = lambda answer: None,
    ) -> None:
        self.name, self.make, self.size, self.timeout_s = name, make, size, timeout_s
        self.max_size, self.retry_policy, self.verify = max_size or size, retry_policy, verify
        self.waiting: deque[Call] = deque()
        self.broadcast_state: tuple[str, tuple] | None = None
        self.started = self.lost = 0
        self.ever_ready = False
        self.events: deque[tuple[float, str]] = deque(maxlen=20)
        self.spans: deque[Span] = deque(maxlen=MOST_SPANS)
        self.slots = [Slot(index) for index in range(size)]
        self.workers: list[Worker] = []
        for slot in self.slots:
            self._start_worker(slot)

    def _start_worker(self, slot: Slot) -> None:
        name = f"{self.name}-{self.started}"
        self.started += 1
        actor = self.make(name, slot.index)
        worker = Worker(name, actor, slot, slot.index >= self.size, actor.__ray_call__.remote(location_of))
        if self.broadcast_state:
            method, args = self.broadcast_state
            worker.adopting = getattr(actor, method).remote(*args)
        self.workers = sorted([*self.workers, worker], key=lambda w: w.slot.index)

    @property
    def busy(self) -> bool:
        """Tell whether calls are queued or in work."""
        return bool(self.waiting or any(worker.calls for worker in self.workers))

    @property
    def ready_workers(self) -> list[Worker]:
        """Return the workers that calls may go to."""
        return [worker for worker in self.workers if worker.ready]

    @property
    def has_room(self) -> bool:
        """Tell whether a call would go to a worker at once, or to the first one that comes."""
        ready = self.ready_workers
        return not self.waiting and (not ready or any(len(worker.calls) < DEPTH for worker in ready))

    @property
    def empty_slots(self) -> list[Slot]:
        """Return the slots without a worker."""
        taken = [worker.slot for worker in self.workers]
        return [slot for slot in self.slots if slot not in taken]

    def grow(self) -> None:
        """Start one worker more, unless `max_size` are there, or one is still starting or missing."""
        if len(self.workers) < self.max_size and all(worker.ready for worker in self.workers) and not self.empty_slots:
            used = {worker.slot.index for worker in self.workers}
            self._start_worker(Slot(next(index for index in range(self.size, self.max_size) if index not in used)))

    def trim(self) -> None:
        """Stop the spare workers that had nothing to do since the last `trim`."""
        for worker in [worker for worker in self.ready_workers if worker.spare and not (worker.used or worker.calls)]:
            self._stop_worker(worker)
        for worker in self.ready_workers:
            worker.used = False

    def _stop_worker(self, worker: Worker) -> None:
        ray.kill(worker.actor)
        self.workers.remove(worker)

    def submit(self, key: Hashable, method: str, *args: Any, returns: int = 1, tries: int | None = None) -> None:
        """Queue one call; `stream` yields its result. With `tries` it may lose as many workers before it is given up,
        where the pool gives calls up at all."""
        self.waiting.append(Call(key, method, args, returns, tries))
        self._feed()

    def _feed(self) -> None:
        """Hand out calls in their order. A call avoids the slots that it was lost on while there are others."""
        passed: list[Call] = []  # they wait for a worker on another slot
        while self.waiting and any(len(worker.calls) < DEPTH for worker in self.ready_workers):
            call = self.waiting.popleft()
            able = [w for w in self.ready_workers if w.slot.index not in call.slots] or self.ready_workers
            worker = min(able, key=lambda w: len(w.calls))
            if len(worker.calls) >= DEPTH:
                passed.append(call)
            else:
                self._hand(call, worker)
        self.waiting.extendleft(reversed(passed))

    def _hand(self, call: Call, worker: Worker) -> None:
        worker.used = True
        if not worker.calls:
            worker.since = time.monotonic()
        refs = getattr(worker.actor, call.method).options(num_returns=call.returns).remote(*call.args)
        refs = [refs] if call.returns == 1 else refs
        worker.calls[refs[0]] = (call, tuple(refs[1:]))

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Give a state to every worker, and to all that start later before they get any work.

        Returns the answers of the workers that are ready, which are one at least. A worker that is late is replaced.
        """
        self.broadcast_state = (method, args)
        asked = [worker for worker in self.workers if worker.ready]
        for worker in self.workers:
            worker.adopting = getattr(worker.actor, method).remote(*args)
            if worker.starting is None:  # else it still starts, since it was made
                worker.since = time.monotonic()

        def answered() -> bool:
            late = any(worker in self.workers and not worker.ready for worker in asked)
            return bool(self.ready_workers) and not late

        self.wait_until(answered)
        return [worker.answer for worker in self.ready_workers]

    def wait_until(self, there: Callable[[], bool]) -> None:
        """Take in workers that get ready until `there` holds. TimeoutError names who is missing."""
        began = time.monotonic()
        while not there():
            refs = [ref for worker in self.workers for ref in (worker.starting, worker.adopting) if ref is not None]
            for ref in _wait(refs, [self], 1.0):
                self.collect(ref)
            self.supervise()
            waited = time.monotonic() - began
            if waited > MAX_LATE_TRIES * self.timeout_s and not there():
                raise TimeoutError(f"{self.name} is not ready after {waited:.0f} s: {self.missing()}")

    def missing(self) -> str:
        """Say which workers are not ready, and why."""
        states = [(f"{worker.name} is {worker.phase}", worker.slot) for worker in self.workers if not worker.ready]
        states += [(f"nobody is on slot {slot.index}", slot) for slot in self.empty_slots]
        return "; ".join(state + (f", after: {slot.error}" if slot.error else "") for state, slot in states)

    def _replace(self, worker: Worker, error: Exception) -> list[Done]:
        """Stop a worker and put its calls back at the head of the queue, in their order.

        Returns the results of calls that are given up. Only the call in work can have killed the worker.
        """
        if worker not in self.workers:
            return []
        never_up = isinstance(error, RuntimeEnvSetupError) or getattr(error, "actor_init_failed", False)
        if never_up and not worker.spare and not self.ever_ready:
            raise start_error(worker.name, error) from error
        calls, slot = [call for call, _ in worker.calls.values()], worker.slot
        self._stop_worker(worker)
        if never_up and worker.spare:
            self.max_size = self.size
            self._log_event(f"{self.name} does not grow: {start_error(worker.name, error)}")
            return []
        self.lost += 1
        slot.failures, slot.error = slot.failures + 1, reason(error)
        given_up = self._give_up(calls, slot, error)
        self.waiting.extendleft(reversed(calls))
        pause = QUARANTINE_S if slot.quarantined else BACKOFF_S * 2 ** (slot.failures - 2) if slot.failures > 1 else 0.0
        slot.lost = time.monotonic()
        slot.due = slot.lost + pause
        self._log_event(self._loss_message(worker, calls, pause), worker.name)
        for other in list(self.workers):
            if other.spare and other.starting is not None and not worker.spare:
                self._stop_worker(other)  # it might take the room that the new worker needs
        if all(slot.quarantined for slot in self.empty_slots) and not self.workers:
            raise WorkersLost(f"{self.name}: no worker lives long enough to do anything, the last with: {slot.error}")
        self._restart_due()
        self._feed()  # those that are left may have nothing to do, and nobody may come
        return given_up

    def _restart_due(self) -> None:
        """Start a new worker on each empty slot whose pause is over."""
        for slot in self.empty_slots:
            if time.monotonic() >= slot.due:
                self._start_worker(slot)

    def _loss_message(self, worker: Worker, calls: list[Call], pause: float) -> str:
        where, slot = f" ({worker.location})" if worker.location else "", worker.slot
        work = f"{len(calls)} calls go to others" if calls else "it had no work"
        if worker.spare:
            after = "it was a spare one"
        elif slot.quarantined:
            after = f"slot {slot.index} is quarantined for {pause:g} s after {slot.failures} workers in a row"
        else:
            after = f"a new one starts in {pause:g} s" if pause else "a new one starts"
        return f"{worker.name}{where} was lost: {slot.error}; {work}; {after}"

    def _log_event(self, text: str, worker: str | None = None) -> None:
        self.events.append((time.time(), text))
        log.warning("%s", text, extra={"worker": worker})

    def _give_up(self, calls: list[Call], slot: Slot, error: Exception) -> list[Done]:
        """Take the call in work out of `calls` where it has lost too many workers, and return its result."""
        if not calls:
            return []
        call, late = calls[0], isinstance(error, TimeoutError)
        call.losses += 1
        call.slots.add(slot.index)
        tries = (call.tries or self.retry_policy.tries) if self.retry_policy else MAX_LATE_TRIES if late else MAX_TRIES
        if call.losses < tries:
            return []
        del calls[0]
        if not self.retry_policy and late:
            raise error
        if not self.retry_policy:
            raise WorkersLost(
                f"{self.name}: {call.method}({call.key}) lost its worker {call.losses} times: {slot.error}"
            ) from error
        message = f"{self.name} lost {call.losses} workers: {slot.error}"
        slot.failures = 0  # the call is to blame, not the slot
        return [Done(self, call.key, GivenUp("timeout" if late else "unavailable", message), ())]

    def collect(self, ref: Any) -> list[Done]:
        """Return the calls that a ready reference finishes, and take in starts and answers to broadcasts."""
        worker = next((w for w in self.workers if ref in w.refs), None)
        if worker is None:
            return []  # the worker has been replaced meanwhile
        value: Any
        try:
            value = ray.get(ref, timeout=self.timeout_s)
        except LOST as error:
            return self._replace(worker, error)
        except GetTimeoutError:
            error = TimeoutError(f"the answer of {worker.name} did not come within {self.timeout_s:g} s")
            return self._replace(worker, error)
        except RayTaskError as error:
            if not isinstance(cause_of(error), ObjectLostError):
                raise cause_of(error) from error
            value = InputLost(reason(cause_of(error)))
        except ObjectLostError as error:  # the result went down with its node; Ray will soon say so of the worker
            return self._replace(worker, error)
        if worker.starting is None:
            self.spans.append(Span(worker.name, worker.doing, worker.since, time.monotonic()))
        worker.since = time.monotonic()
        if ref not in worker.calls:
            return self._arrived(worker, ref, value)
        call, refs = worker.calls.pop(ref)
        worker.slot.failures = 0
        self._feed()
        return [Done(self, call.key, value, refs)]

    def _arrived(self, worker: Worker, ref: Any, value: Any) -> list[Done]:
        if ref == worker.starting:
            worker.starting, worker.location = None, value
        elif isinstance(value, InputLost):
            return self._replace(worker, RuntimeError(value.message))
        else:
            self.verify(value)
            worker.adopting, worker.answer = None, value
        if worker.ready:
            self.ever_ready = worker.used = True
            self._feed()
        return []

    def supervise(self) -> list[Done]:
        """Start workers that are due and replace those over their deadline. Returns calls that are given up."""
        self._restart_due()
        now, given_up = time.monotonic(), []
        for worker in list(self.workers):
            limit = self.retry_policy.deadline_s if self.retry_policy and worker.calls else self.timeout_s
            works = worker.starting is None and (worker.calls or worker.adopting is not None)
            if works and now - worker.since > limit:
                error = TimeoutError(f"{worker.name} gave no answer to {worker.phase} in {limit:g} s")
                given_up += self._replace(worker, error)
        return given_up

    def work(self, since: float) -> list[Span]:
        """Return the spans of work that ended after `since` (monotonic seconds) or still go on, these up to now."""
        now = time.monotonic()
        on = [Span(w.name, w.doing, w.since, now) for w in self.workers if w.starting is None and w.refs]
        return [span for span in self.spans if span.end > since] + on

    def status(self) -> list[WorkerStatus]:
        """Say what every worker does, and what has become of empty slots. Another thread may call it."""
        now = time.monotonic()
        found = [
            WorkerStatus(w.name, w.location, w.phase, w.since, bool(w.calls) or not (w.ready or w.spare))
            for w in list(self.workers)
        ]
        for slot in self.empty_slots:
            state = "quarantined" if slot.quarantined else "lost"
            text = f"{state}, next try in {max(0.0, slot.due - now):.0f} s; last error: {slot.error}"
            found.append(WorkerStatus(f"{self.name} slot {slot.index}", "", text, slot.lost, waiting=False))
        return found

    def shutdown(self) -> None:
        """End all workers."""
        for worker in self.workers:
            ray.kill(worker.actor)
        self.workers = []


def location_of(actor: Any) -> str:
    """Return the node and process of the actor that this runs in."""
    return f"{ray.util.get_node_ip_address()} pid {os.getpid()}"


def stream(
    *pools: Pool,
    until: Callable[[], bool] = lambda: False,
    beside: Sequence[Any] = (),
    seconds: float = math.inf,
) -> Iterator[Done]:
    """Yield results of all pools as they come, until nothing is queued or running. New work may be added meanwhile.

    It ends earlier where `until` holds. With `beside`, references to work of others, it goes on until one of them is
    ready, or for `seconds`, whether the pools have work or not. Raises TimeoutError, which names who is waited for,
    when no worker gets ready for the pools' deadline.
    """
    deadline = max(pool.timeout_s for pool in pools)
    tick = min(5.0, deadline / 4, *(pool.retry_policy.deadline_s / 4 for pool in pools if pool.retry_policy))
    heard, end = time.monotonic(), time.monotonic() + seconds
    while not until() and ((busy := any(pool.busy for pool in pools)) or (beside and time.monotonic() < end)):
        refs = {ref: pool for pool in pools for worker in pool.workers for ref in worker.refs}
        ready = _wait([*beside, *refs], pools, max(0.0, min(tick, end - time.monotonic())))
        if beside and (time.monotonic() >= end or any(ref in beside for ref in ready)):
            return
        found = [done for ref in ready for done in refs[ref].collect(ref)]
        found += [done for pool in pools for done in pool.supervise()]
        if ready or found or not busy or any(worker.calls for pool in pools for worker in pool.workers):
            heard = time.monotonic()
        yield from found
        if time.monotonic() - heard > deadline:
            missing = "; ".join(pool.missing() for pool in pools if pool.busy)
            raise TimeoutError(f"no worker came for {deadline:g} s: {missing}")


def _wait(refs: list, pools: Sequence[Pool], seconds: float) -> list:
    """Return at most one ready reference, after at most `seconds` or when a new worker is due."""
    due = [slot.due - time.monotonic() for pool in pools for slot in pool.empty_slots]
    seconds = max(0.0, min([seconds, *due]))
    if not refs:
        time.sleep(seconds)
        return []
    return ray.wait(refs, num_returns=1, timeout=seconds)[0]


def fetch(references: Any, timeout_s: float) -> Any:
    """Return what references refer to. Raises TimeoutError where the object store does not bring it in time."""
    try:
        return ray.get(references, timeout=timeout_s)
    except GetTimeoutError as error:
        raise TimeoutError(f"the object store did not bring what is there within {timeout_s:g} s") from error
