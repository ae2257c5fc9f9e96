"""Hedged requests: where one takes long, a second one like it is sent, and the first good answer of the two counts."""

import contextlib
import socket
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue


class Call:
    """A request under way, which another thread can end."""

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self.ended = False

    def made(self, sock: socket.socket) -> socket.socket:
        """The connection stands; ConnectionAbortedError where nobody wants it any more."""
        self.sock = sock
        if self.ended:
            raise ConnectionAbortedError("another request was faster")
        return sock

    def end(self) -> None:
        """Closes the connection for whoever waits at it."""
        self.ended = True
        if self.sock:
            with contextlib.suppress(OSError):  # it has ended already
                self.sock.shutdown(socket.SHUT_RDWR)


def hedged(ask: Callable[[Call], bytes], after_s: float | None) -> bytes:
    """The answer that `ask` gets. Where there is none after so many seconds, it is asked once more; the first answer
    counts, and the other call is ended. An error counts where it comes before the second call, or where both fail: one
    worker's trouble must not stand for the other's scores. None asks once.
    """
    if after_s is None:
        return ask(Call())
    calls, arrived = (Call(), Call()), SimpleQueue()

    def answer(call: Call) -> None:
        try:
            arrived.put(ask(call))
        except Exception as error:
            arrived.put(error)

    def start(call: Call) -> None:
        threading.Thread(target=answer, args=[call], daemon=True).start()

    try:
        start(calls[0])
        try:
            found = arrived.get(timeout=after_s)
        except Empty:
            start(calls[1])
            found = arrived.get()
            if isinstance(found, Exception):
                found = arrived.get()
    finally:
        for call in calls:
            call.end()
    if isinstance(found, Exception):
        raise found
    return found
