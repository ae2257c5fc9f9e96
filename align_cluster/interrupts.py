"""Handles SIGTERM, by which clusters announce that they take a machine away, and Ctrl-C.

Either ends what runs in good order: the first one raises, later ones do not disturb the saving, and a block that must
be whole holds them back.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from align_cluster.errors import INTERRUPTED, RETRY, Preempted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVING = "checkpoint of step"  # prefix of the names of threads that must finish before the process ends
GRACE_S = 15.0  # seconds for leaving in good order, half of the 30 s after which Kubernetes and Slurm send SIGKILL


SAID = {signal.SIGTERM: "ended by SIGTERM; start again with --resume auto", signal.SIGINT: "interrupted"}
CODES = {signal.SIGTERM: RETRY, signal.SIGINT: INTERRUPTED}


class _Interrupts:
    """The first signal that came, whether a block holds it back, and whether there is anything to leave in order."""

    def __init__(self, alone: bool) -> None:
        self.alone, self.importing = alone, alone
        self.first, self.held, self.due = None, False, False

    def receive(self, number: int, _: Any) -> None:
        """Handle a signal: end at once, remember it for the end of a block, or raise KeyboardInterrupt."""
        if self.first is not None:  # another one must not stop the saving
            return
        self.first = number
        if self.importing:  # an exception in the middle of an import is caught by some library, and the module is half
            os.write(2, f"{SAID[number]}\n".encode())
            os._exit(CODES[number])
        if self.alone:
            threading.Thread(target=self._leave, daemon=True).start()
        if self.held:
            self.due = True
            return
        raise KeyboardInterrupt  # the one exception that Ray lets through from a signal handler

    def _leave(self) -> None:
        """End the process where it does not end by itself: where Ray's own processes got the signal, Ray may hang."""
        time.sleep(GRACE_S)
        while any(thread.name.startswith(SAVING) for thread in threading.enumerate()):
            time.sleep(0.2)
        os._exit(CODES[self.first])


_now: _Interrupts | None = None


@contextmanager
def interruptible(alone: bool = False) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C stop what runs inside at once, with Preempted and with KeyboardInterrupt.

    `alone` says that the process has nothing else to do: it ends within a short time, whatever hangs, and further
    signals are ignored from then on. Until `begun` it ends at once. Inside of another such context, and in other
    threads than the main one, this does nothing.
    """
    global _now
    if _now or threading.current_thread() is not threading.main_thread():
        yield
        return
    now = _now = _Interrupts(alone)
    # A shell starts its background jobs with Ctrl-C ignored, and so it stays.
    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, now.receive)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        # Ray's own handler, which holds while Ray starts, exits with the signal's number.
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
            now.first = signal.SIGTERM
        if now.first == signal.SIGTERM:
            raise Preempted from None
        raise
    finally:
        _now = None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if alone and now.first is not None else handler)


def begun() -> None:
    """Say that imports are done and work begins: from now on signals end this process in good order, not at once."""
    if _now:
        _now.importing = False


def interrupted() -> bool:
    """Tell whether a signal has come that ends what runs in `interruptible`."""
    return _now is not None and _now.first is not None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold signals back until the end of this block, which must be short and belongs together."""
    now = _now
    if now is None or now.held:
        yield
        return
    now.held = True
    try:
        yield
    finally:
        now.held = False
    if now.due:
        now.due = False
        raise KeyboardInterrupt
