"""What a pool knows of its workers and their work: plain records."""

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align_cluster.types import FailureKind

if TYPE_CHECKING:
    from align_cluster.cluster.pool import Pool

STRIKES = 5  # workers lost in a row on one seat, until it is left alone


@dataclass
class Call:
    """One unit of work: which method, with what; `returns` splits the result into that many objects. `seats` are
    those whose worker was lost with it."""

    key: Hashable
    method: str
    args: tuple
    returns: int = 1
    losses: int = 0
    seats: set[int] = field(default_factory=set)


@dataclass
class Seat:
    """A place for a worker: `strikes` count those lost there since one of them finished a call, `error` is the last
    one's, and the next may come at `due` (monotonic seconds)."""

    index: int
    strikes: int = 0
    due: float = 0.0
    error: str = ""

    @property
    def quarantined(self) -> bool:
        return self.strikes >= STRIKES


@dataclass
class Worker:
    """One actor and the calls queued on it, by the reference that is waited for; the first is the one in work.

    `arrival` and `state` are references to its start and to its answer to the pool's broadcast, None once they have
    come: then it gets calls. `place` is its node and process, `since` when it began what it does now. `spare` workers
    came for a backlog; `used` tells whether they were of use.
    """

    name: str
    actor: Any
    seat: Seat
    spare: bool
    arrival: Any
    state: Any = None
    answer: Any = None
    place: str = ""
    used: bool = False
    since: float = field(default_factory=time.monotonic)
    calls: dict = field(default_factory=dict)

    @property
    def up(self) -> bool:
        return self.arrival is None and self.state is None

    @property
    def refs(self) -> tuple:
        return tuple(ref for ref in (self.arrival, self.state, *self.calls) if ref is not None)

    @property
    def phase(self) -> str:
        if self.arrival is not None:
            return "waiting for room, or starting" if self.spare else "starting"
        if self.state is not None:
            return "taking over the weights"
        call = next((call for call, _ in list(self.calls.values())), None)
        return f"{call.method} {call.key}" if call else "idle"


@dataclass(frozen=True)
class Doing:
    """What one worker does, and since when (monotonic seconds). `waiting` tells whether somebody waits for it."""

    worker: str
    place: str
    phase: str
    since: float
    waiting: bool = True


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
class InputLost:
    """In the place of a result: something that the call was given went down with its node."""

    message: str


@dataclass(frozen=True)
class Patience:
    """With work that may hang or kill its workers: after `deadline_s` of one call its worker is replaced, and after
    `tries` workers the call's result is a GivenUp."""

    deadline_s: float
    tries: int
