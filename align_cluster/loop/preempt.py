"""Handles SIGTERM, by which clusters announce that they take a machine away."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from align_cluster.checkpoint.writer import THREAD
from align_cluster.errors import RETRY, Preempted

GRACE_S = 15.0  # seconds for leaving in good order, half of the 30 s after which Kubernetes and Slurm send SIGKILL


@contextmanager
def preemptible(alone: bool) -> Iterator[None]:
    """Let SIGTERM stop what runs inside at once, as Ctrl-C does, and raises Preempted then. Enter it after ray.init,
    which sets a handler of its own.

    `alone` says that the process has nothing else to do. It then ends with RETRY where Ray does not let go of it, which
    happens where Ray's own processes got the signal too.
    """
    signalled = False

    def stop(*_: Any) -> None:
        nonlocal signalled
        if signalled:  # a second one must not stop the saving
            return
        signalled = True
        if alone:
            threading.Thread(target=_leave, daemon=True).start()
        raise KeyboardInterrupt  # the one exception that Ray lets through from a signal handler

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if signalled:
            raise Preempted from None
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if signalled else before)


def _leave() -> None:
    time.sleep(GRACE_S)
    while any(thread.name.startswith(THREAD) for thread in threading.enumerate()):
        time.sleep(0.2)
    os._exit(RETRY)
