"""Answers HTTP at a port: uvicorn, with a deadline for each phase of a connection, and a bound on their number.

uvicorn itself has deadlines for idle connections alone: one that is opened and never used, or whose headers never end,
would stay. It bounds requests at once (`limit_concurrency`) and not connections.
"""

import json
import socket
import threading
import time
from asyncio import TimerHandle, Transport
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from align_cluster.serving.config import Limits

KEEP_ALIVE_S = 5  # An idle connection is closed after this; RewardClient opens one for each request anyway.
ANSWER_S = 60.0  # for a request beside the limits of its body and its score: it is decoded, and its answer is read
HEAD_BYTES = 2**17  # Headers that do not end are read so far: twice what api.py accepts of those that do.
TOO_LONG = json.dumps({"detail": f"the headers have more than {HEAD_BYTES} bytes; send fewer"}).encode()
REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    b"connection: close\r\n\r\n%s" % (len(TOO_LONG), TOO_LONG)
)


class Connection(HttpToolsProtocol):
    """One connection of a client, which is closed where it does not go on in time.

    It has `header_timeout_s` from its opening, and again from each answer, to the end of a request's headers. The
    answer then has to be out before all limits of time for a request are over. Where there are more connections than
    the limit, the one that has waited longest without a request in work gives way to the newest.
    """

    def __init__(self, limits: Limits, **settings: Any) -> None:
        """Take what uvicorn gives to its protocols as `settings`."""
        super().__init__(**settings)
        self.limits = limits
        self.deadline: TimerHandle | None = None
        self.since = 0  # ns, when the deadline began; the loop's own clock has too few digits to tell who came first
        self.head: int | None = None  # bytes of the headers so far, while they arrive
        self.refused = False

    def connection_made(self, transport: Transport) -> None:
        """Start the first deadline, and make room."""
        super().connection_made(transport)
        self._within(self.limits.header_timeout_s)
        if len(self.connections) > self.limits.connections:
            waiting = (one for one in self.connections if one.cycle is None or one.cycle.response_complete)
            min(waiting, key=lambda one: one.since).drop()

    def connection_lost(self, error: Exception | None) -> None:
        """Stop the deadline."""
        self.deadline.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        """Parse what has come, unless headers without an end were refused; the client may still be sending them."""
        if self.refused:
            return
        if self.head is not None:
            self.head += len(data)
        super().data_received(data)
        if self.head is not None and self.head > HEAD_BYTES:
            self.refused = True
            self.transport.write(REFUSAL)

    def on_message_begin(self) -> None:
        """Count the bytes of the headers from here on."""
        self.head = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Give the request its time."""
        self.head = None
        self._within(self.limits.body_timeout_s + self.limits.score_timeout_s + ANSWER_S)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, and for the end of a body that was refused."""
        super().on_response_complete()
        if self.cycle.response_complete:
            self._within(self.limits.header_timeout_s)

    def drop(self) -> None:
        """Close the connection at once."""
        self.connections.discard(self)
        self.transport.abort()

    def _within(self, seconds: float) -> None:
        if self.deadline:
            self.deadline.cancel()
        self.deadline, self.since = self.loop.call_later(seconds, self.drop), time.monotonic_ns()


def bound(host: str, port: int) -> socket.socket:
    """Return a socket at the address, which nobody else gets from now on. OSError where it cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


@contextmanager
def listening(app: Any, listener: socket.socket, limits: Limits) -> Iterator[None]:
    """Answer with an ASGI app at a bound socket, in a thread, for the length of a with block.

    Requests in work are finished at the end.
    """
    config = uvicorn.Config(
        app,
        http=partial(Connection, limits),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="http")
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
