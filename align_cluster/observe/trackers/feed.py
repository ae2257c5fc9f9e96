"""Feeds trackers from threads of their own, so that one which fails or is slow neither stops nor slows the training."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from align_cluster.errors import counted
from align_cluster.observe.trackers.base import TrackedRun, Tracker, Values

MOST = 500  # rows that wait for one tracker, some megabytes: it is hundreds of steps behind then
CLOSE_S = 20.0  # seconds that all trackers together may take to finish when the run ends
Row = tuple[int, Values]


class Feed:
    """Hands rows to one tracker in their order. `put` never waits: where MOST rows wait already, it drops the row.

    The first loss is told with its reason, and the number of lost rows at the end. metrics.jsonl has them all.
    """

    def __init__(
        self, name: str, tracker: Tracker, run: TrackedRun, earlier: Iterable[Row], note: Callable[[str], None]
    ) -> None:
        """Begin in a thread. `earlier` are the rows of steps that were done before the run was resumed."""
        self.name, self.tracker, self.run, self.earlier, self.note = name, tracker, run, earlier, note
        self.waiting: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self.given = self.taken = 0  # rows since this driver started
        self.told = self.failed = False
        self.thread = threading.Thread(target=self._work, name=f"track {name}", daemon=True)
        self.thread.start()

    def put(self, step: int, values: Values) -> None:
        """Hand over some numbers of a step, or drop them."""
        self.given += 1
        if self.waiting.qsize() < MOST:
            self.waiting.put((step, values))
        else:
            self._tell(f"is {MOST} rows behind")

    def end(self, failed: bool) -> None:
        """Tell the tracker, after all that waits, that the run has ended. It does not wait for that."""
        self.failed = failed
        self.waiting.put(None)

    def join(self, until: float) -> None:
        """Wait until the tracker has everything, or until then (monotonic), and say what it lacks."""
        self.thread.join(max(0.0, until - time.monotonic()))
        self.told = True  # what it finds out later helps nobody
        said = ["did not finish in time"] if self.thread.is_alive() else []
        if lost := self.given - self.taken:
            said.append(f"lacks {counted(lost, 'row')} of this run")
        if said:
            self.note(f"track: {self.name} {' and '.join(said)}; metrics.jsonl has every step")

    def _work(self) -> None:
        try:
            wanted = self.tracker.open(self.run)
        except Exception as error:  # whatever a package for the network raises
            self._tell(f"cannot be used ({_reason(error)})")
            while self.waiting.get() is not None:
                pass
            return
        for row in self.earlier if wanted else ():
            self._guarded(self.tracker.write, *row)
        while (row := self.waiting.get()) is not None:
            self.taken += self._guarded(self.tracker.write, *row)
        self._guarded(self.tracker.close, self.failed)

    def _guarded(self, call: Callable[..., None], *args: object) -> bool:
        """Call the tracker, and return whether that went well."""
        try:
            call(*args)
        except Exception as error:
            self._tell(f"fails ({_reason(error)})")
            return False
        return True

    def _tell(self, why: str) -> None:
        told, self.told = self.told, True
        if not told:
            self.note(f"track: {self.name} {why}; the run goes on, and metrics.jsonl has every step")


def close(feeds: Sequence[Feed], failed: bool) -> None:
    """End all feeds, in CLOSE_S seconds together."""
    for feed in feeds:
        feed.end(failed)
    until = time.monotonic() + CLOSE_S
    for feed in feeds:
        feed.join(until)


def _reason(error: Exception) -> str:
    """Return the first line of an error in at most 200 characters."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]
