"""A supervised pool of identical workers: what a worker that is lost or hangs had to do goes to another one."""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayTaskError, RuntimeEnvSetupError

from align_cluster.cluster.errors import LOST, cause_of, reason, start_error
from align_cluster.cluster.slots import Call, Doing, Done, GivenUp, InputLost, Patience, Seat, Worker

DEPTH = 2  # calls queued on a worker: the next one is there when the first ends
TRIES = 4  # of a call whose worker is lost
LATE_TRIES = 2  # of a call that is not answered in time
BACKOFF_S = 0.5  # before the third worker of a seat; twice as long before each later one
REST_S = 300.0  # for which it is
log = logging.getLogger(__name__)


class Pool:
    """`size` actors, number i made by `make(name, i)`. A call whose worker was lost goes to another one, up to 3 times.

    A lost worker's successor comes at once, the next ones with growing pauses; after STRIKES in a row its seat is
    quarantined for REST_S, and the others do the work. Errors that the work itself raises are not retried: they rise to
    the caller as they are. `grow` hires up to `most` workers where the cluster has room for them; their index is `size`
    or more. `prove` raises where an answer to a broadcast is not what it must be.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[str, int], Any],
        size: int,
        timeout_s: float,
        most: int | None = None,
        patience: Patience | None = None,
        prove: Callable[[Any], None] = lambda answer: None,
    ) -> None:
        self.name, self.make, self.size, self.timeout_s = name, make, size, timeout_s
        self.most, self.patience, self.prove = most or size, patience, prove
        self.waiting: deque[Call] = deque()
        self.news: tuple[str, tuple] | None = None
        self.born = self.lost = 0
        self.came_up = False
        self.troubles: deque[tuple[float, str]] = deque(maxlen=20)  # with the time of day
        self.seats = [Seat(index) for index in range(size)]
        self.workers: list[Worker] = []
        for seat in self.seats:
            self._hire(seat)

    def _hire(self, seat: Seat) -> None:
        name = f"{self.name}-{self.born}"
        self.born += 1
        actor = self.make(name, seat.index)
        worker = Worker(name, actor, seat, seat.index >= self.size, actor.__ray_call__.remote(whereabouts))
        if self.news:
            method, args = self.news
            worker.state = getattr(actor, method).remote(*args)
        self.workers = sorted([*self.workers, worker], key=lambda w: w.seat.index)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or any(worker.calls for worker in self.workers))

    @property
    def staff(self) -> list[Worker]:
        """Workers that calls may go to."""
        return [worker for worker in self.workers if worker.up]

    @property
    def room(self) -> bool:
        """Whether a call would go to a worker at once, or to the first one that comes."""
        return not self.waiting and (not self.staff or any(len(worker.calls) < DEPTH for worker in self.staff))

    @property
    def vacant(self) -> list[Seat]:
        """Seats without a worker."""
        taken = [worker.seat for worker in self.workers]
        return [seat for seat in self.seats if seat not in taken]

    def grow(self) -> None:
        """Hire one worker more, unless `most` are there, or one is still coming or missing."""
        if len(self.workers) < self.most and all(worker.up for worker in self.workers) and not self.vacant:
            used = {worker.seat.index for worker in self.workers}
            self._hire(Seat(next(index for index in range(self.size, self.most) if index not in used)))

    def trim(self) -> None:
        """Let those go that `grow` hired and that had nothing to do since the last `trim`."""
        for worker in [worker for worker in self.staff if worker.spare and not (worker.used or worker.calls)]:
            self._drop(worker)
        for worker in self.staff:
            worker.used = False

    def _drop(self, worker: Worker) -> None:
        ray.kill(worker.actor)
        self.workers.remove(worker)

    def submit(self, key: Hashable, method: str, *args: Any, returns: int = 1) -> None:
        """Queue one call; `stream` yields its result."""
        self.waiting.append(Call(key, method, args, returns))
        self._feed()

    def _feed(self) -> None:
        """Hand out calls, the first ones first, and none to a seat that it was lost on while there is another one."""
        for call in list(self.waiting):
            able = [w for w in self.staff if w.seat.index not in call.seats] or self.staff
            worker = min(able, key=lambda w: len(w.calls), default=None)
            if worker is None or len(worker.calls) >= DEPTH:
                if all(len(w.calls) >= DEPTH for w in self.staff):
                    return
                continue
            self.waiting.remove(call)
            worker.used = True
            if not worker.calls:
                worker.since = time.monotonic()
            refs = getattr(worker.actor, call.method).options(num_returns=call.returns).remote(*call.args)
            refs = [refs] if call.returns == 1 else refs
            worker.calls[refs[0]] = (call, tuple(refs[1:]))

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Give this state to every worker and to all that come later, before any work. Returns the answers of those
        that are up, one at least; who is late is replaced."""
        self.news = (method, args)
        asked = [worker for worker in self.workers if worker.up]
        for worker in self.workers:
            worker.state, worker.since = getattr(worker.actor, method).remote(*args), time.monotonic()
        self._until(lambda: self.staff and not any(worker in self.workers and not worker.up for worker in asked))
        return [worker.answer for worker in self.staff]

    def assemble(self) -> None:
        """Wait until all workers are up."""
        self._until(lambda: not self.vacant and all(worker.up for worker in self.workers))

    def _until(self, there: Callable[[], bool]) -> None:
        """Take in who comes up until `there` holds."""
        began = time.monotonic()
        while not there():
            refs = [ref for worker in self.workers for ref in (worker.arrival, worker.state) if ref is not None]
            for ref in _wait(refs, [self], 1.0):
                self.collect(ref)
            self.tend()
            waited = time.monotonic() - began
            if waited > LATE_TRIES * self.timeout_s and not there():
                raise TimeoutError(f"{self.name} is not ready after {waited:.0f} s: {self.missing()}")

    def missing(self) -> str:
        """Who is not there, for messages."""
        states = [(f"{worker.name} is {worker.phase}", worker.seat) for worker in self.workers if not worker.up]
        states += [(f"nobody is on seat {seat.index}", seat) for seat in self.vacant]
        return "; ".join(state + (f", after: {seat.error}" if seat.error else "") for state, seat in states)

    def _replace(self, worker: Worker, error: Exception) -> list[Done]:
        """Let the worker go and put its calls at the head of the queue, in their order; returns what is given up. Only
        the call in work may be to blame."""
        if worker not in self.workers:
            return []
        never_up = isinstance(error, RuntimeEnvSetupError) or getattr(error, "actor_init_failed", False)
        if never_up and not worker.spare and not self.came_up:
            raise start_error(worker.name, error) from error
        calls, seat = [call for call, _ in worker.calls.values()], worker.seat
        self._drop(worker)
        if never_up and worker.spare:
            self.most = self.size
            self._note(f"{self.name} does not grow: {start_error(worker.name, error)}")
            return []
        self.lost += 1
        seat.strikes, seat.error = seat.strikes + 1, reason(error)
        given_up = self._give_up(calls, seat, error)
        self.waiting.extendleft(reversed(calls))
        pause = REST_S if seat.quarantined else BACKOFF_S * 2 ** (seat.strikes - 2) if seat.strikes > 1 else 0.0
        seat.due = time.monotonic() + pause
        self._note(self._obituary(worker, calls, pause))
        for other in list(self.workers):
            if other.spare and other.arrival is not None and not worker.spare:
                self._drop(other)  # it might take the room that the successor needs
        if all(seat.quarantined for seat in self.vacant) and not self.workers:
            raise RuntimeError(f"{self.name}: no worker lives long enough to do anything, the last with: {seat.error}")
        self._fill()
        return given_up

    def _fill(self) -> None:
        """Hire the successors whose time has come."""
        for seat in self.vacant:
            if time.monotonic() >= seat.due:
                self._hire(seat)

    def _obituary(self, worker: Worker, calls: list[Call], pause: float) -> str:
        where, seat = f" ({worker.place})" if worker.place else "", worker.seat
        work = f"{len(calls)} calls go to others" if calls else "it had no work"
        if worker.spare:
            after = "it was a spare one"
        elif seat.quarantined:
            after = f"seat {seat.index} is quarantined for {pause:g} s after {seat.strikes} workers in a row"
        else:
            after = f"a successor comes in {pause:g} s" if pause else "a successor comes"
        return f"{worker.name}{where} was lost: {seat.error}; {work}; {after}"

    def _note(self, text: str) -> None:
        self.troubles.append((time.time(), text))
        log.warning("%s", text)

    def _give_up(self, calls: list[Call], seat: Seat, error: Exception) -> list[Done]:
        """Take the call in work away where it has lost too many workers."""
        if not calls:
            return []
        call, late = calls[0], isinstance(error, TimeoutError)
        call.losses += 1
        call.seats.add(seat.index)
        if call.losses < (self.patience.tries if self.patience else LATE_TRIES if late else TRIES):
            return []
        del calls[0]
        if not self.patience and late:
            raise error
        if not self.patience:
            raise RuntimeError(
                f"{self.name}: {call.method}({call.key}) lost its worker {call.losses} times: {seat.error}"
            ) from error
        message = f"{self.name} lost {call.losses} workers: {seat.error}"
        seat.strikes = 0  # it is the call's fault
        return [Done(self, call.key, GivenUp("timeout" if late else "unavailable", message), ())]

    def collect(self, ref: Any) -> list[Done]:
        """What has come of a reference that is ready."""
        worker = next((w for w in self.workers if ref in w.refs), None)
        if worker is None:
            return []  # its worker has been replaced meanwhile
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
        except ObjectLostError as error:  # the result went down with its node, and soon the worker is known to have
            return self._replace(worker, error)
        worker.since = time.monotonic()
        if ref not in worker.calls:
            return self._arrived(worker, ref, value)
        call, refs = worker.calls.pop(ref)
        worker.seat.strikes = 0
        self._feed()
        return [Done(self, call.key, value, refs)]

    def _arrived(self, worker: Worker, ref: Any, value: Any) -> list[Done]:
        if ref == worker.arrival:
            worker.arrival, worker.place = None, value
        elif isinstance(value, InputLost):
            return self._replace(worker, RuntimeError(value.message))
        else:
            self.prove(value)
            worker.state, worker.answer = None, value
        if worker.up:
            self.came_up = worker.used = True
            self._feed()
        return []

    def tend(self) -> list[Done]:
        """Hire successors whose time has come, and replace workers that are over the deadline with what they do."""
        self._fill()
        now, given_up = time.monotonic(), []
        for worker in list(self.workers):
            limit = self.patience.deadline_s if self.patience and worker.calls else self.timeout_s
            works = worker.arrival is None and (worker.calls or worker.state is not None)
            if works and now - worker.since > limit:
                error = TimeoutError(f"{worker.name} gave no answer to {worker.phase} in {limit:g} s")
                given_up += self._replace(worker, error)
        return given_up

    def roster(self) -> list[Doing]:
        """What every worker does, and what has become of the seats that are empty. Another thread may ask."""
        now = time.monotonic()
        found = [
            Doing(w.name, w.place, w.phase, w.since, bool(w.calls) or not (w.up or w.spare)) for w in list(self.workers)
        ]
        for seat in self.vacant:
            state = "quarantined" if seat.quarantined else "lost"
            text = f"{state}, next try in {max(0.0, seat.due - now):.0f} s; last error: {seat.error}"
            found.append(Doing(f"{self.name} seat {seat.index}", "", text, now))
        return found

    def shutdown(self) -> None:
        for worker in self.workers:
            ray.kill(worker.actor)
        self.workers = []


def whereabouts(actor: Any) -> str:
    """Node and process of the actor that this runs in."""
    return f"{ray.util.get_node_ip_address()} pid {os.getpid()}"


def stream(*pools: Pool) -> Iterator[Done]:
    """Results of all pools as they come, until nothing is queued or running; new work may be submitted in between.

    Raises TimeoutError, naming who is waited for, when work waits for workers that do not come for the pools' deadline.
    """
    deadline = max(pool.timeout_s for pool in pools)
    tick = min(5.0, deadline / 4, *(pool.patience.deadline_s / 4 for pool in pools if pool.patience))
    heard = time.monotonic()
    while any(pool.busy for pool in pools):
        refs = {ref: pool for pool in pools for worker in pool.workers for ref in worker.refs}
        ready = _wait(list(refs), pools, tick)
        found = [done for ref in ready for done in refs[ref].collect(ref)]
        found += [done for pool in pools for done in pool.tend()]
        if ready or found or any(worker.calls for pool in pools for worker in pool.workers):
            heard = time.monotonic()
        yield from found
        if time.monotonic() - heard > deadline:
            missing = "; ".join(pool.missing() for pool in pools if pool.busy)
            raise TimeoutError(f"no worker came for {deadline:g} s: {missing}")


def _wait(refs: list, pools: Sequence[Pool], seconds: float) -> list:
    """The references that are ready, at most one, after so many seconds or when a successor is to be hired."""
    due = [seat.due - time.monotonic() for pool in pools for seat in pool.vacant]
    seconds = max(0.0, min([seconds, *due]))
    if not refs:
        time.sleep(seconds)
        return []
    return ray.wait(refs, num_returns=1, timeout=seconds)[0]
