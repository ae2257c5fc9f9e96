"""Hedged requests to real servers that are slow, full or gone."""

import asyncio
import queue
import socket
import threading
import time
from contextlib import closing, contextmanager

import numpy as np
import pytest
from pydantic import ValidationError

from align_cluster.rewards.base import RewardError
from align_cluster.rewards.client import RewardClient
from align_cluster.rewards.http import Http
from align_cluster.rewards.limits import Limits
from align_cluster.rewards.wire import encode_answer
from align_cluster.types import Prompt, Scores

IMAGES = np.full((2, 4, 4, 3), 7, np.uint8)
PROMPTS = [Prompt(0, "a"), Prompt(1, "b")]
SCORES = Scores({"r": np.array([1.0, 2.0])}, {"r": np.ones(2, bool)})
RIGHT = encode_answer(SCORES, 0.1).model_dump_json().encode()
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(RIGHT), RIGHT)
FULL = b'HTTP/1.1 429 Full\r\nContent-Length: 17\r\n\r\n{"detail":"full"}'


@contextmanager
def server(*answers):
    """URL of a server that gives each connection one of the answers, (seconds, bytes), and a queue in which (its
    number, whether the client hung up before the answer) appear."""
    ended = queue.Queue()

    def serve(number, connection):
        seconds, answer = answers[number]
        with connection:
            connection.settimeout(5)
            while b"}" not in connection.recv(2**16):  # the images are small
                pass
            connection.settimeout(seconds)
            try:
                gone = not connection.recv(2**16)
            except TimeoutError:
                gone = False
                connection.sendall(answer)
            ended.put((number, gone))

    def accept(listening):
        for number in range(len(answers)):
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(number, connection), daemon=True).start()

    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        threading.Thread(target=accept, args=[listening], daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", ended


def score(url, hedge_s=0.1, timeout_s=5.0):
    started = time.monotonic()
    scores = RewardClient(url, timeout_s=timeout_s, hedge_s=hedge_s).score(["r"], IMAGES, PROMPTS)
    assert scores.failures == {} and scores.values["r"].tolist() == [1.0, 2.0]
    return time.monotonic() - started


def test_a_second_request_overtakes_a_slow_one_which_is_hung_up():
    with server((4.0, GOOD), (0.01, GOOD)) as (url, ended):
        assert score(url) < 2
        assert [ended.get(timeout=1) for _ in range(2)] == [(1, False), (0, True)]


def test_a_first_answer_in_time_costs_no_second_request():
    with server((0.01, GOOD), (0.01, GOOD)) as (url, ended):
        score(url, hedge_s=1.0)
        assert ended.get(timeout=1) == (0, False)
        with pytest.raises(queue.Empty):
            ended.get(timeout=0.2)


def test_a_second_request_that_is_refused_does_not_stand_for_the_first():
    with server((0.5, GOOD), (0.01, FULL)) as (url, ended):
        score(url)
        assert [ended.get(timeout=1) for _ in range(2)] == [(1, False), (0, False)]


def test_the_other_answer_counts_where_the_slow_request_fails():
    with server((0.3, FULL), (0.5, GOOD)) as (url, _):
        score(url)


def test_an_early_refusal_is_no_reason_to_ask_again():
    with server((0.01, FULL), (0.01, GOOD)) as (url, _), pytest.raises(RewardError, match="429: full"):
        score(url, hedge_s=1.0)


def test_both_requests_end_at_the_deadline_of_the_first():
    with server((4.0, GOOD), (4.0, GOOD)) as (url, ended):
        started = time.monotonic()
        with pytest.raises(RewardError, match="within 0.5 s") as caught:
            score(url, timeout_s=0.5)
        assert caught.value.kind == "timeout" and 0.4 < time.monotonic() - started < 1.5
        assert sorted(ended.get(timeout=1) for _ in range(2)) == [(0, True), (1, True)]


def test_without_hedging_a_slow_answer_is_waited_for():
    with server((0.3, GOOD), (0.01, GOOD)) as (url, _):
        assert score(url, hedge_s=None) >= 0.3


def test_a_reward_of_a_run_hedges_at_a_service_that_is_slow_once(http_server):
    from align_cluster.serving.api import create_app

    class Backend:
        calls = 0

        async def score(self, reward, images, prompts):
            self.calls += 1
            if self.calls == 1:
                await asyncio.sleep(3)
            return SCORES

        async def unready(self):
            return []

    backend = Backend()
    with http_server(create_app(Limits(), [{"name": "r"}], None, backend)) as url:
        reward = Http(Http.Config(url=url, reward="r", hedge_s=0.2))
        reward.load("cpu", 1)
        started = time.monotonic()
        assert reward.score(IMAGES, PROMPTS).values.tolist() == [1.0, 2.0]
        assert time.monotonic() - started < 2 and backend.calls == 2
        assert reward.score(IMAGES, PROMPTS).values.tolist() == [1.0, 2.0] and backend.calls == 3


def test_hedging_after_the_end_is_refused():
    with pytest.raises(ValidationError, match="below timeout_s, 10"):
        Http.Config(url="http://a", reward="r", timeout_s=10, hedge_s=10)
