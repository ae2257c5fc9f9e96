"""SIGTERM, by which clusters announce that they take a machine away."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from align_cluster.checkpoint.writer import THREAD
from align_cluster.errors import RETRY, Preempted

GRACE_S = 15.0  # for leaving in good order; Kubernetes and Slurm send SIGKILL after 30 s


@contextmanager
def preemptible(alone: bool) -> Iterator[None]:
    """SIGTERM stops what runs inside like Ctrl-C, at once, and comes out as Preempted. Enter it after ray.init, which
    sets a handler of its own.

    `alone`: the process has nothing else to do, so it is ended with RETRY where Ray does not let go of it. That happens
    where Ray's own processes got the signal too.
    """
    told = False

    def stop(*_: Any) -> None:
        nonlocal told
        if told:  # a second one must not stop the saving
            return
        told = True
        if alone:
            threading.Thread(target=_leave, daemon=True).start()
        raise KeyboardInterrupt  # the one exception that Ray lets through from a signal handler

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can be told
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if told:
            raise Preempted from None
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if told else before)


def _leave() -> None:
    time.sleep(GRACE_S)
    while any(thread.name.startswith(THREAD) for thread in threading.enumerate()):
        time.sleep(0.2)
    os._exit(RETRY)
