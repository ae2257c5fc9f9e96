"""What strangers may send to a service, over real sockets to a real server: each is refused with its status and a
sentence, and the service scores on as if nothing had been.
"""

import contextlib
import http.client
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from align_cluster.rewards.wire import MEDIA_TYPE

from .bad_requests import BAD, IMAGES, LIMITS, PNG, TOKEN, flow, http_request, request

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

SCORERS = {
    "NaN": ("nan", "1 of 1 values are not finite"),
    "infinity": ("inf", "1 of 1 values are not finite"),
    "a wrong shape": ("shape", "values has shape (1, 1) for 1 images"),
    "too few": ("short", "values has shape (0,) for 1 images"),
    "words": ("words", "TypeError"),
    "nothing": ("nothing", "AttributeError"),
    "an error": ("raises", "KeyError: 'missing'"),
}


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[int, int]]:
    """(port, process id) of a service in a process of its own."""
    command = [sys.executable, Path(__file__).with_name("serving.py"), LIMITS.model_dump_json(), TOKEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield int(process.stdout.readline()), process.pid
        process.terminate()


def ask(port, data, method="POST"):
    """(status, text) of the answer to bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was read
            sock.sendall(data)
        with contextlib.closing(http.client.HTTPResponse(sock, method=method)) as response:
            response.begin()
            return response.status, response.read().decode()


def scores_right(port):
    status, text = ask(port, request(PNG))
    return status == 200 and json.loads(text)["rewards"]["bright"]["values"] == [float(IMAGES[0, 0, 0, 0])]


def test_each_bad_request_is_refused_in_a_sentence_and_leaves_no_trace(service):
    wrong = {}
    for name, (data, status, words) in BAD.items():
        found, text = ask(service[0], data)
        sentence = json.loads(text)["detail"] if text.startswith("{") else text
        said = sentence and "\n" not in sentence and len(sentence) < 600 and words in sentence
        if found != status or not said or not scores_right(service[0]):
            wrong[name] = (found, sentence)
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())
    assert len(BAD) >= 200


def test_what_a_reward_may_not_return_is_its_failure_and_nobody_elses(service):
    for reward, words in SCORERS.values():
        status, text = ask(service[0], request(PNG, rewards=["bright", reward]))
        found = json.loads(text)["rewards"]
        assert status == 200 and found["bright"]["values"] == [float(IMAGES[0, 0, 0, 0])]
        assert found[reward]["values"] == [None] and found[reward]["valid"] == [False]
        assert found[reward]["failure"]["kind"] == "model_error" and words in found[reward]["failure"]["message"]
        status, text = ask(service[0], flow({"images": [PNG], "prompts": ["p"]}, f"/v1/flow_grpo/{reward}"))
        answer = json.loads(text)
        assert status == 200 and answer["scores"] == answer["outputs"] == [None]
        assert answer["failure"]["kind"] == "model_error" and words in answer["failure"]["message"]


def test_a_detail_that_is_not_finite_is_null(service):
    found = json.loads(ask(service[0], request(PNG, rewards=["inf_detail"]))[1])["rewards"]["inf_detail"]
    assert found["valid"] == [True] and found["details"] == {"ratio": [None]}


CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n"
BODY = request(PNG).partition(b"\r\n\r\n")[2]


def test_unusual_but_right_requests_are_scored(service):
    for data in (
        http_request(BODY),
        http_request(BODY, Expect="100-continue"),
        http_request(CHUNKS % (len(BODY), BODY), Content_Length=None, Transfer_Encoding="chunked"),
        http_request(BODY, Content_Type=f"{MEDIA_TYPE.upper()}; version=1"),
        http_request(BODY, path="/v1/score?x=%00"),
    ):
        status, text = ask(service[0], data)
        assert status == 200 and json.loads(text)["rewards"]["bright"]["values"] == [float(IMAGES[0, 0, 0, 0])]


def test_clients_that_leave_halfway_give_their_places_back(service):
    for end in [socket.SHUT_WR, socket.SHUT_RDWR] * LIMITS.concurrency:
        with socket.create_connection(("127.0.0.1", service[0])) as sock:
            sock.sendall(request(PNG)[:-20])
            time.sleep(0.01)
            sock.shutdown(end)
    before = time.monotonic()
    while not scores_right(service[0]):
        assert time.monotonic() - before < LIMITS.body_timeout_s / 2  # after which they would be given back anyway


def test_2000_bad_requests_leave_no_memory_behind(service):
    port, process = service[0], psutil.Process(service[1])
    bad = [data for name, (data, *_) in BAD.items() if not name.startswith("slow")]
    for data in itertools.islice(itertools.cycle(bad), 600):  # until allocators and caches have what they want
        ask(port, data)
    before = process.memory_info().rss
    for data in itertools.islice(itertools.cycle(bad), 2000):
        assert ask(port, data)[0] < 500
    grown = (process.memory_info().rss - before) / 2**20
    assert grown < 2  # .25 as measured; they carry 16 MiB
    assert scores_right(port)
