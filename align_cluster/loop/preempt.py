"""SIGTERM, by which clusters announce that they take a machine away."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from align_cluster.types import Preempted


@contextmanager
def preemptible() -> Iterator[None]:
    """SIGTERM stops what runs inside like Ctrl-C, at once, and comes out as Preempted. Enter it after ray.init, which
    sets a handler of its own."""
    told = False

    def stop(*_: Any) -> None:
        nonlocal told
        if not told:  # a second one must not stop the saving
            told = True
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
