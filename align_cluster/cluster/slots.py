"""Records of what a pool knows of its workers and their work."""

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from align_cluster.types import FailureKind

MAX_FAILURES = 5  # workers lost in a row on one slot before it is quarantined: more than an unlucky node restart costs


@dataclass
class Call:
    """Describes one unit of work: which method to call, and with what.

    `returns` splits the result into that many objects. `tries` is how many workers it may lose (None: as the pool's
    policy says). `losses` counts the workers that were lost with it, and `slots` are the slots where that happened.
    """

    key: Hashable
    method: str
    args: tuple
    returns: int = 1
    tries: int | None = None
    losses: int = 0
    slots: set[int] = field(default_factory=set)


@dataclass
class Slot:
    """Keeps the history of one place for a worker.

    `failures` counts the workers lost there since one of them finished a call, and `error` says why the last one was
    lost. That was at `lost`, and the next worker starts at `due` (monotonic seconds).
    """

    index: int
    failures: int = 0
    lost: float = 0.0
    due: float = 0.0
    error: str = ""

    @property
    def quarantined(self) -> bool:
        """Tell whether so many workers were lost in a row that the slot is left alone for a while."""
        return self.failures >= MAX_FAILURES


@dataclass
class Worker:
    """Holds one actor and the calls queued on it, by the reference that is waited for; the first call is in work.

    `starting` refers to its start and `adopting` to its answer to the pool's broadcast; each is None once it has come,
    and then the worker gets calls. `location` is its node and process, `since` the time when it began what it does now.
    The pool starts `spare` workers for a backlog; `used` tells whether they had anything to do.
    """

    name: str
    actor: Any
    slot: Slot
    spare: bool
    starting: Any
    adopting: Any = None
    answer: Any = None
    location: str = ""
    used: bool = False
    since: float = field(default_factory=time.monotonic)
    calls: dict = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Tell whether calls may go to the worker."""
        return self.starting is None and self.adopting is None

    @property
    def refs(self) -> tuple:
        """Return all references that the pool waits for."""
        return tuple(ref for ref in (self.starting, self.adopting, *self.calls) if ref is not None)

    @property
    def doing(self) -> str:
        """Name the kind of work that a worker which has started does, or did last."""
        if self.adopting is not None:
            return "adopt"
        return next((call.method for call, _ in list(self.calls.values())), "idle")

    @property
    def phase(self) -> str:
        """Say in words what the worker does."""
        if self.starting is not None:
            return "waiting for room, or starting" if self.spare else "starting"
        if self.adopting is not None:
            return "taking over the weights"
        call = next((call for call, _ in list(self.calls.values())), None)
        return f"{call.method} {call.key}" if call else "idle"


class Span(NamedTuple):
    """Says that a worker did one thing from `start` to `end` (monotonic seconds), as the driver sees it."""

    worker: str
    doing: str
    start: float
    end: float


@dataclass(frozen=True)
class WorkerStatus:
    """Says what one worker does, and since when (monotonic seconds). `waiting` tells whether somebody waits for it."""

    worker: str
    location: str
    phase: str
    since: float
    waiting: bool = True


@dataclass(frozen=True)
class GivenUp:
    """Stands in the place of a result and says why there is none."""

    kind: FailureKind
    message: str


@dataclass(frozen=True)
class InputLost:
    """Stands in the place of a result where one of the call's arguments went down with its node."""

    message: str


@dataclass(frozen=True)
class RetryPolicy:
    """Bounds work that may hang or kill its workers.

    A worker that is busy with one call for more than `deadline_s` is replaced. After `tries` workers the call's result
    is a GivenUp.
    """

    deadline_s: float
    tries: int
