"""The HTTP side of a service without Ray, on a real socket."""

import asyncio
import hashlib
import http.client
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from align_cluster.rewards.base import RewardError
from align_cluster.rewards.http import Http, RewardClient
from align_cluster.rewards.wire import MEDIA_TYPE, encode_request
from align_cluster.rewards.worker import RewardWorker
from align_cluster.serving.config import Limits
from align_cluster.types import Failure, Prompt, Scores

IMAGES = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
PROMPTS = [Prompt(i, f"p{i}") for i in range(3)]
LIMITS = Limits(body_bytes=20_000, concurrency=2, body_timeout_s=0.5, score_timeout_s=0.5)
TOKEN = "secret"


class Backend:
    """`bright` is an image's first byte, `nan` undefined; the others fail in their way, some on image 1 alone."""

    names = ["bright", "nan", "late", "gone", "broken", "bad_input", "model_error"]

    def __init__(self) -> None:
        self.missing: list[str] = []

    async def score(self, reward, images, prompts):
        count = len(images)
        if reward == "late":
            await asyncio.sleep(5)
        if reward == "gone":
            raise ConnectionError("lost the worker")
        if reward == "broken":
            return Scores(
                {reward: np.full(count, np.nan)},
                {reward: np.zeros(count, bool)},
                {reward: Failure("bad_input", "RewardError: not an image", tuple(range(count)))},
            )
        if reward in ("bad_input", "model_error"):
            values = np.where(np.arange(count) == 1, np.nan, images[:, 0, 0, 0])
            return Scores({reward: values}, {reward: np.isfinite(values)}, {reward: Failure(reward, "odd", (1,))})
        values = images[:, 0, 0, 0] * (1.0 if reward == "bright" else np.nan)
        return Scores({reward: values}, {reward: np.isfinite(values)})

    async def unready(self):
        return self.missing


@pytest.fixture(scope="module")
def service(http_server) -> Iterator[tuple[str, Backend]]:
    from align_cluster.serving.api import create_app

    backend = Backend()
    described = [{"name": name, "kind": "test"} for name in Backend.names]
    with http_server(
        create_app(backend, described, limits=LIMITS, token=hashlib.sha256(TOKEN.encode()).digest())
    ) as url:
        yield url, backend


def opened(url, length, body=b"", **headers):
    """A connection that has sent the headers of a request to score, and a part of its body."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/v1/score")
    named = {"Authorization": f"Bearer {TOKEN}", "Content-Type": MEDIA_TYPE, **length, **headers}
    for name, value in named.items():
        connection.putheader(name, value)
    connection.endheaders(body or None)
    return connection


def answer(connection):
    with connection.getresponse() as response:
        return response.status, json.loads(response.read())["detail"]


def test_failures_of_rewards_are_typed_and_leave_the_others_alone(service):
    client = RewardClient(service[0], TOKEN)
    scores = client.score(["late", "gone", "broken", "bright", "nan"], IMAGES, PROMPTS)
    assert scores.failures == {
        "late": Failure("timeout", "no score in 0.5 s", (0, 1, 2)),
        "gone": Failure("unavailable", "lost the worker", (0, 1, 2)),
        "broken": Failure("bad_input", "RewardError: not an image", (0, 1, 2)),
    }
    np.testing.assert_array_equal(scores.values["bright"], [0, 1, 2])
    assert scores.valid["bright"].all() and not any(scores.valid[name].any() for name in ("late", "gone", "nan"))


def test_a_run_takes_the_scores_beside_a_bad_input_and_asks_again_after_other_failures(service, monkeypatch):
    """What the senders' mistake costs stays so; a service tries once, and the run's policy says how often it tries."""
    monkeypatch.setenv("SERVICE_TOKEN", TOKEN)
    for name in ("bad_input", "model_error"):
        reward = Http(Http.Config(url=service[0], reward=name, token={"env": "SERVICE_TOKEN"}))
        reward.load("cpu", 1)
        if name == "bad_input":
            result = reward.score(IMAGES, PROMPTS)
            assert result.failure == Failure("bad_input", "odd", (1,)) and result.valid.tolist() == [True, False, True]
            np.testing.assert_array_equal(result.values, [0, np.nan, 2])
        else:
            with pytest.raises(RewardError, match="odd") as caught:
                reward.score(IMAGES, PROMPTS)
            assert caught.value.kind == "model_error"


def test_a_service_counts_images_and_failures(service):
    def read():
        connection = http.client.HTTPConnection(service[0].removeprefix("http://"))
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
        lines = connection.getresponse().read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    client = RewardClient(service[0], TOKEN)
    client.score(["bright"], IMAGES, PROMPTS)
    before = read()
    client.score(["bright", "broken"], IMAGES, PROMPTS)
    after = read()
    for name, more in [
        ('align_cluster_images_total{job="",reward="bright"}', 3),
        ('align_cluster_failures_total{job="",kind="bad_input",reward="broken"}', 3),
        ('align_cluster_requests_total{job="",status="200"}', 1),
        ("align_cluster_request_seconds_count", 1),
        ('align_cluster_reward_seconds_count{reward="bright"}', 1),
    ]:
        assert after[name] - before.get(name, 0) == more


def test_a_service_counts_by_job_and_no_stranger_makes_it_count_many(service, monkeypatch):
    from align_cluster.serving import api

    monkeypatch.setattr(api, "MOST_JOBS", 2)

    def counted():
        connection = http.client.HTTPConnection(service[0].removeprefix("http://"))
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
        return connection.getresponse().read().decode()

    monkeypatch.setenv("SERVICE_TOKEN", TOKEN)
    far = Http.Config(url=service[0], reward="bright", token={"env": "SERVICE_TOKEN"})
    RewardWorker({"far": far}, job="sd35-nft").score(IMAGES, PROMPTS)
    RewardClient(service[0], TOKEN, job="sd35-nft").score(["broken"], IMAGES, PROMPTS)
    text = counted()
    assert 'align_cluster_images_total{job="sd35-nft",reward="bright"} 3.0' in text
    assert 'align_cluster_failures_total{job="sd35-nft",kind="bad_input",reward="broken"} 3.0' in text
    assert 'align_cluster_requests_total{job="sd35-nft",status="200"} 2.0' in text
    with pytest.raises(RewardError, match="401"):
        RewardClient(service[0], "wrong", job="stranger").score(["bright"], IMAGES, PROMPTS)
    RewardClient(service[0], TOKEN, job="no name").score(["bright"], IMAGES, PROMPTS)
    for number in range(3):
        with pytest.raises(RewardError, match="no reward 'x' here"):
            RewardClient(service[0], TOKEN, job=f"job-{number}").score(["x"], IMAGES[:1], PROMPTS[:1])
    jobs = set(re.findall('job="([^"]*)"', counted()))
    assert jobs == {"", "sd35-nft", "job-0", "other"}


def test_a_refusal_says_whether_a_token_came_and_nothing_of_it(service):
    for given, words, challenge in (
        (None, "no token came", "Bearer"),
        ("Basic c2VjcmV0", "no token came", "Bearer"),
        ("Bearer guess", "the token that came is not the service's", 'Bearer error="invalid_token"'),
    ):
        connection = http.client.HTTPConnection(service[0].removeprefix("http://"))
        connection.request("GET", "/v1/rewards", headers={"Authorization": given} if given else {})
        with connection.getresponse() as response:
            detail = json.loads(response.read())["detail"]
            assert (response.status, response.headers["WWW-Authenticate"]) == (401, challenge)
        assert detail == f"{words}; give the service's as `Authorization: Bearer TOKEN`"


def test_the_page_of_the_documentation_shows_all_routes_and_loads_nothing():
    from starlette.testclient import TestClient

    from align_cluster.rewards.geneval import GenEval
    from align_cluster.serving.api import create_app
    from align_cluster.serving.service import describe

    described = describe({"objects": GenEval.Config(), "<b>": GenEval.Config(score="strict")})
    app = create_app(Backend(), described, limits=LIMITS, token=None)
    page = TestClient(app).get("/docs")
    assert page.headers["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert not re.search(r"<script|<link|<img|src=|@import|url\(", page.text)
    assert re.findall('href="([^"]*)"', page.text) == ["/openapi.json"]
    assert all(path in page.text for path in app.openapi()["paths"])
    assert "<td>at most 1</td>" in page.text and "<td>0 to 1</td>" in page.text
    assert "objects that an image must show" in page.text and "<b>" not in page.text


def test_more_requests_than_the_limit_are_answered_at_once(service):
    slow = [opened(service[0], {"Content-Length": "100"}, b"12345") for _ in range(2)]
    time.sleep(0.1)
    with pytest.raises(RewardError, match="429: 2 requests are in work") as caught:
        RewardClient(service[0], TOKEN).score(["bright"], IMAGES, PROMPTS)
    assert caught.value.kind == "unavailable"
    assert [answer(connection)[0] for connection in slow] == [408, 408]
    assert RewardClient(service[0], TOKEN).score(["bright"], IMAGES, PROMPTS).valid["bright"].all()


def test_a_client_that_leaves_gives_its_place_back(service):
    for _ in range(4):
        opened(service[0], {"Content-Length": "100"}, b"12345").close()
    time.sleep(0.2)
    assert RewardClient(service[0], TOKEN).score(["bright"], IMAGES, PROMPTS).valid["bright"].all()


def test_a_service_is_ready_while_all_rewards_are(service):
    url, backend = service
    RewardClient(url).ready()
    backend.missing = ["late"]
    with pytest.raises(RewardError, match="503: not ready: late"):
        RewardClient(url).ready()
    backend.missing = []


def test_a_refusal_reaches_a_client_that_still_sends(service, monkeypatch):
    for body in (bytes(10_000_000), encode_request(["bright"], np.repeat(IMAGES, 200, 0), PROMPTS, "raw")):
        monkeypatch.setattr("align_cluster.rewards.http.encode_request", lambda *_, body=body: body)
        with pytest.raises(RewardError, match="413") as caught:
            RewardClient(service[0], TOKEN).score(["bright"], IMAGES, PROMPTS)
        assert caught.value.kind == "bad_input"


def test_threads_share_a_client_and_an_event_loop_may_run_where_it_is_called(service):
    client, expected = RewardClient(service[0], TOKEN), list(range(3))

    def scores(_=None):
        return client.score(["bright"], IMAGES, PROMPTS).values["bright"].tolist()

    async def in_a_notebook():
        return scores()

    assert asyncio.run(in_a_notebook()) == expected
    with ThreadPoolExecutor(2) as threads:  # As many as the service takes at once.
        assert list(threads.map(scores, range(20))) == [expected] * 20
