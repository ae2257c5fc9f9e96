"""Connections that do not go on, and more of them than a service holds, over real sockets."""

import asyncio
import hashlib
import http.client
import json
import socket
import threading

import pytest

from align_cluster.rewards.wire import MEDIA_TYPE
from align_cluster.serving.config import Limits

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

BRIEF = Limits(header_timeout_s=0.3, body_timeout_s=0.3, connections=8, concurrency=2)
PATIENT = Limits(connections=8)
TOKEN = "secret"
START = b"POST /v1/score HTTP/1.1\r\nHost: service\r\n"
UNKNOWN = START + b"Content-Length: 1000\r\n\r\n"  # without a token, and then without the rest of its body
POST = START + f"Authorization: Bearer {TOKEN}\r\nContent-Type: {MEDIA_TYPE}\r\n".encode()
GET = b"GET /healthz HTTP/1.1\r\nHost: service\r\n\r\n"


class Backend:
    """Is asked whether it is ready, and answers when `answer` is set."""

    def __init__(self):
        self.answer, self.asked = threading.Event(), 0

    async def score(self, reward, images, prompts):
        raise NotImplementedError

    async def unready(self):
        self.asked += 1
        while not self.answer.is_set():
            await asyncio.sleep(0.01)
        return []


@pytest.fixture
def serve(http_server):
    """Function (limits, paths without token) -> context with the URL of a service that needs TOKEN."""
    from align_cluster.serving.api import create_app

    def serving(limits, without_token=(), backend=None):
        token = hashlib.sha256(TOKEN.encode()).digest()
        app = create_app(
            backend or Backend(), [{"name": "bright"}], limits=limits, token=token, without_token=without_token
        )
        return http_server(app, limits)

    return serving


def connect(url: str, data: bytes = b"") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(data)
    return connection


def rest(connection: socket.socket) -> bytes:
    """All that still comes until the service closes the connection."""
    parts = []
    try:
        while part := connection.recv(2**16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def drip(connection: socket.socket, piece: bytes) -> None:
    """Send a piece again and again until the service has closed the connection."""
    over = threading.Event()
    with pytest.raises(OSError):
        for _ in range(600):
            connection.sendall(piece)
            over.wait(0.05)


def status(url: str, path: str, token: str | None = None) -> int:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
    with connection.getresponse() as response:
        return response.status


def test_a_connection_that_does_not_go_on_is_closed_without_a_token(serve):
    with serve(BRIEF) as url:
        for data in (b"", b"PO", START, START + b"X: "):
            assert rest(connect(url, data)) == b""
        assert b" 200 " in rest(connect(url, GET))
        assert b" 200 " in rest(connect(url, GET + START))  # Its second request never comes.
        assert b" 401 " in rest(connect(url, UNKNOWN))


def test_headers_and_refused_bodies_that_drip_are_cut_off(serve):
    with serve(BRIEF) as url:
        drip(connect(url, START), b"X: a\r\n")
        drip(connect(url, UNKNOWN), b"a")


def test_headers_without_an_end_are_refused_while_the_client_still_sends(serve):
    with serve(PATIENT) as url, connect(url, START) as connection:
        for _ in range(20):
            connection.sendall(b"X: %s\r\n" % (b"x" * 20_000))
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 431 and json.loads(answer.read())["detail"].startswith("the headers have more than")


def test_the_longest_idle_connection_gives_way_to_a_new_one(serve):
    with serve(PATIENT) as url:
        idle = [connect(url, START) for _ in range(PATIENT.connections)]
        assert status(url, "/healthz") == 200
        assert rest(idle[0]) == b""
        for connection in idle[1:]:
            connection.sendall(b"\r\n")
        assert all(connection.recv(100).startswith(b"HTTP/1.1 401") for connection in idle[1:])


def test_connections_with_a_request_in_work_keep_their_places(serve):
    with serve(PATIENT) as url:
        busy = [connect(url, POST + b"Content-Length: 4\r\nExpect: 100-continue\r\n\r\n") for _ in range(8)]
        assert all(connection.recv(100).startswith(b"HTTP/1.1 100") for connection in busy)
        assert rest(connect(url, GET)) == b""
        for connection in busy:
            connection.sendall(b"none")
            assert connection.recv(100).startswith(b"HTTP/1.1 422")


def test_strangers_who_ask_whether_a_service_is_ready_share_one_answer(serve):
    backend = Backend()
    with serve(PATIENT, backend=backend) as url:
        asking = [connect(url, GET.replace(b"healthz", b"readyz")) for _ in range(6)]
        assert status(url, "/healthz") == 200  # Whatever came before it has been read.
        backend.answer.set()
        assert all(connection.recv(100).startswith(b"HTTP/1.1 200") for connection in asking)
        assert backend.asked == 1


def test_a_body_that_drips_over_its_limit_of_time_is_refused(serve):
    with serve(BRIEF) as url, connect(url, POST + b"Content-Length: 1000\r\n\r\n") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


CLOSED = ("/v1/rewards", "/metrics", "/docs", "/openapi.json")


def test_all_but_health_stands_behind_the_token_unless_a_setting_opens_it(serve):
    with serve(PATIENT) as url:
        assert [status(url, path) for path in ("/healthz", *CLOSED)] == [200, 401, 401, 401, 401]
        assert [status(url, path, TOKEN) for path in CLOSED] == [200] * 4
        assert status(url, "/redoc", TOKEN) == 404
    with serve(PATIENT, without_token=["metrics"]) as url:
        assert [status(url, path) for path in CLOSED] == [401, 200, 401, 401]
    with serve(PATIENT, without_token=["docs"]) as url:
        assert [status(url, path) for path in CLOSED] == [401, 401, 200, 200]
