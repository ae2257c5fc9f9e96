"""A service on the session's Ray, asked over HTTP."""

import base64
import http.client
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from align_cluster.cli import main
from align_cluster.config.load import loads
from align_cluster.embedded import scene
from align_cluster.embedded.render import render
from align_cluster.errors import UserError
from align_cluster.rewards.base import RewardError
from align_cluster.rewards.http import Http, RewardClient
from align_cluster.rewards.wire import MEDIA_TYPE, encode_image, encode_request
from align_cluster.rewards.worker import RewardWorker
from align_cluster.serving.config import ServiceConfig
from align_cluster.types import Failure, Prompt

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

ROOT = Path(__file__).parents[2]
TOKEN = "a-secret-of-the-tests"
RECORDS = scene.prompts("colors", "held_out")[:4]
IMAGES = render(RECORDS, 1).permute(0, 2, 3, 1).numpy()
PROMPTS = [Prompt(i, record["prompt"], record) for i, record in enumerate(RECORDS)]
SERVICE = """\
rewards:
  objects: {kind: geneval, score: mixed}
  clip: {kind: clip_score}
deployments:
  objects: {cpus: 0.3, batch: 8}
  clip: {cpus: 0.3, batch: 8}
token: {env: REWARD_SERVICE_TOKEN}
limits: {body_bytes: 1000000, images: 8, concurrency: 4}
start_timeout_s: 120
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def config() -> ServiceConfig:
    return loads(SERVICE, "service.yaml", [f"port={free_port()}"], ServiceConfig)


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the service says while it starts."""
    return []


@pytest.fixture(scope="module")
def url(local_ray: object, config: ServiceConfig, said: list[str]) -> Iterator[str]:
    from align_cluster.serving.service import serving

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWARD_SERVICE_TOKEN", TOKEN)
        with serving(config, said.append) as url:
            yield url


@pytest.fixture(scope="module")
def worker(config: ServiceConfig) -> RewardWorker:
    return RewardWorker(config.rewards)


def ask(url: str, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {"Authorization": f"Bearer {TOKEN}"} | named)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def score(url: str, body: bytes, **headers: str) -> tuple[int, str]:
    status, text = ask(url, "POST", "/v1/score", body, **({"Content_Type": MEDIA_TYPE} | headers))
    return status, json.loads(text)["detail"] if status != 200 else text


def test_a_service_gives_the_values_of_a_worker_here(url, worker):
    here = worker.score(IMAGES, PROMPTS)
    for encoding in ("png", "webp", "raw"):
        there = RewardClient(url, TOKEN, encoding=encoding).score(["objects", "clip"], IMAGES, PROMPTS)
        assert list(there.values) == ["objects", "clip"] and there.failures == {} and there.valid["objects"].all()
        for part in ("values", "valid", "details"):
            assert getattr(here, part).keys() == getattr(there, part).keys()
            for name, column in getattr(here, part).items():
                np.testing.assert_array_equal(getattr(there, part)[name], column)


def test_a_service_says_what_its_start_waits_for_and_waits_for_a_listener_that_comes_late(url, config, said):
    from align_cluster.serving.service import _wait_until_ready

    assert said[0] == "starting Ray" and said[1].startswith("loading objects, clip")
    late, over, heard = free_port(), threading.Event(), []

    def listen_late() -> None:
        over.wait(1.0)
        with socket.create_server(("127.0.0.1", late)) as server:
            connection, _ = server.accept()
            connection.recv(10_000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            connection.close()

    listener = threading.Thread(target=listen_late)
    listener.start()
    _wait_until_ready(config, f"http://127.0.0.1:{late}", heard.append)
    listener.join()
    assert heard[0].startswith(f"waiting for http://127.0.0.1:{late}")


def test_many_callers_at_once_get_their_own_scores(url, worker):
    here, found = worker.score(IMAGES, PROMPTS).values["clip"], {}

    def ask_for(index: int) -> None:
        client = RewardClient(url, TOKEN, encoding="raw")
        found[index] = client.score(["clip"], IMAGES[index : index + 1], PROMPTS[index : index + 1]).values["clip"][0]

    threads = [threading.Thread(target=ask_for, args=(index,)) for index in range(len(IMAGES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose([found[index] for index in range(len(IMAGES))], here, atol=1e-4)


def test_a_prompt_that_a_reward_cannot_read_is_a_failure_of_that_reward_alone(url):
    broken = Prompt(0, "a circle", {"include": [{"class": "circle"}]})  # a clause without its count
    scores = RewardClient(url, TOKEN).score(["objects", "clip"], IMAGES[:1], [broken])
    message = "metadata of 'a circle': include.0.count: field required, got {'class': 'circle'}"
    assert scores.failures == {"objects": Failure("bad_input", message, (0,))}
    assert np.isnan(scores.values["objects"][0]) and not scores.valid["objects"][0] and scores.valid["clip"][0]


def test_refusals_come_with_their_status_and_a_sentence(url):
    good = encode_request(["clip"], IMAGES, PROMPTS, "png")
    flow_grpo = pickle.dumps({"images": [b"jpeg"], "prompts": ["a circle"], "metadata": {}})
    for body, headers, status, words in [
        (good, {"Authorization": ""}, 401, "Bearer"),
        (good, {"Authorization": "Bearer wrong"}, 401, "Bearer"),
        (bytes(1_000_001), {}, 413, "at most 1000000"),
        (flow_grpo, {"Content_Type": "application/octet-stream"}, 415, "unpickling runs whatever code"),
        (good[:-9], {}, 422, "add up to"),
        (good, {"X": "x" * 100_000}, 431, "at most 65536"),
        (encode_request(["hps"], IMAGES, PROMPTS, "png"), {}, 422, "this service has objects, clip"),
    ]:
        found, sentence = score(url, body, **headers)
        assert found == status and words in sentence, (found, sentence)


def test_flow_grpos_request_is_answered_as_well_but_never_unpickled(url, worker):
    here, fields = worker.score(IMAGES, PROMPTS), {"meta_datas": RECORDS, "only_strict": True}
    data = fields | {"images": [base64.b64encode(encode_image(image, "png")).decode() for image in IMAGES]}
    as_json = {"Content_Type": "application/json"}
    status, text = ask(url, "POST", "/v1/flow_grpo/objects", json.dumps(data).encode(), **as_json)
    answer = json.loads(text)
    assert status == 200 and answer["scores"] == here.values["objects"].tolist() and answer["failure"] is None
    assert answer["group_strict_rewards"]["colors"] == here.details["objects/strict"].tolist()
    status, text = ask(url, "POST", "/v1/flow_grpo/objects", pickle.dumps(data))
    assert status == 415 and "unpickling runs whatever code" in text and "multipart/form-data" in text


def test_the_service_tells_what_it_has_and_how_it_is(url):
    assert ask(url, "GET", "/healthz", Authorization="")[0] == 200
    assert ask(url, "GET", "/readyz", Authorization="")[0] == 200
    for path in ("/v1/rewards", "/metrics", "/docs", "/openapi.json"):
        assert ask(url, "GET", path, Authorization="")[0] == 401
    served = RewardClient(url, TOKEN).rewards()
    assert {name: reward["kind"] for name, reward in served.items()} == {"objects": "geneval", "clip": "clip_score"}
    assert all(reward["version"] and reward["about"] for reward in served.values())
    assert (served["objects"]["range"], served["clip"]["range"]) == ([None, 1.0], [-1.0, 1.0])
    assert list(served["objects"]["inputs"]["metadata"]) == ["include", "exclude", "tag"]
    assert served["clip"]["inputs"]["metadata"] == {}
    status, document = ask(url, "GET", "/openapi.json")
    assert status == 200 and MEDIA_TYPE in json.loads(document)["paths"]["/v1/score"]["post"]["requestBody"]["content"]
    RewardClient(url, TOKEN).score(["clip"], IMAGES, PROMPTS)
    status, text = ask(url, "GET", "/metrics")
    assert status == 200 and 'align_cluster_requests_total{job="",status="200"}' in text
    assert 'align_cluster_images_total{job="",reward="clip"}' in text and "align_cluster_request_seconds_bucket" in text


def test_a_run_uses_the_service_as_one_of_its_rewards(url, worker, monkeypatch):
    monkeypatch.setenv("REWARD_SERVICE_TOKEN", TOKEN)
    settings = {"url": url, "token": {"env": "REWARD_SERVICE_TOKEN"}}
    scores = RewardWorker({"far": Http.Config(reward="objects", **settings)}).score(IMAGES, PROMPTS)
    here = worker.score(IMAGES, PROMPTS)
    np.testing.assert_array_equal(scores.values["far"], here.values["objects"])
    np.testing.assert_array_equal(scores.details["far/graded"], here.details["objects/graded"])
    with pytest.raises(UserError, match="has no reward 'hps'; it has objects, clip"):
        Http(Http.Config(reward="hps", **settings)).load("cpu", 1)
    with pytest.raises(UserError, match="401"):
        Http(Http.Config(reward="clip", url=url)).load("cpu", 1)


def test_a_request_that_the_service_finds_too_large_is_cut_and_scored(url, worker, monkeypatch):
    monkeypatch.setenv("REWARD_SERVICE_TOKEN", TOKEN)
    far = RewardWorker({"far": Http.Config(reward="clip", url=url, token={"env": "REWARD_SERVICE_TOKEN"})})
    scores = far.score(np.repeat(IMAGES, 3, 0), [prompt for prompt in PROMPTS for _ in range(3)])
    assert scores.failures == {} and scores.valid["far"].all()
    here = np.repeat(worker.score(IMAGES, PROMPTS).values["clip"], 3)
    np.testing.assert_allclose(scores.values["far"], here, atol=1e-4)


def test_people_ask_with_the_command_line(url, worker, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("REWARD_SERVICE_TOKEN", TOKEN)
    file = tmp_path / "image.png"
    Image.fromarray(IMAGES[0]).save(file)
    command = ["score", "--url", url, "--prompt", PROMPTS[0].text, str(file), "--reward"]
    assert main([*command, "clip", "--token-env", "REWARD_SERVICE_TOKEN"]) == 0
    here = worker.score(IMAGES[:1], PROMPTS[:1]).values["clip"][0]
    assert capsys.readouterr().out == f"{here:.4f}  {file}\n"
    assert main([*command, "objects", "--token-env", "REWARD_SERVICE_TOKEN"]) == 0
    said = capsys.readouterr()
    assert said.out == f"does not apply  {file}\n"
    assert said.err.startswith("note: objects reads include of --metadata: objects that an image must show: [{")
    include = ["--metadata", json.dumps(PROMPTS[0].metadata)]
    assert main([*command, "objects", "--token-env", "REWARD_SERVICE_TOKEN", *include]) == 0
    here = worker.score(IMAGES[:1], PROMPTS[:1]).values["objects"][0]
    assert capsys.readouterr().out == f"{here:.4f}  {file}\n"
    assert main([*command, "clip"]) == 2
    said = capsys.readouterr().err
    assert "says 401: no token came" in said and said.endswith("; name its variable with --token-env\n")
    monkeypatch.setenv("ANOTHER_TOKEN", "wrong")
    assert main([*command, "clip", "--token-env", "ANOTHER_TOKEN"]) == 2
    said = capsys.readouterr().err
    assert "the token that came is not the service's" in said and "correct what the given variable" in said


def test_a_worker_that_dies_costs_nobody_a_score(local_ray, url, worker):
    """The only worker of a reward: what it had in work, and what comes until its successor is there, waits."""
    here, found = worker.score(IMAGES, PROMPTS).values["clip"], []
    client = RewardClient(url, TOKEN, encoding="raw")

    def ask_for_many() -> None:
        found.extend(client.score(["clip"], IMAGES, PROMPTS) for _ in range(8))

    threads = [threading.Thread(target=ask_for_many) for _ in range(2)]
    for thread in threads:
        thread.start()
    (name,) = [
        actor["name"]
        for actor in local_ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith("SERVE_REPLICA::align-cluster-rewards.clip#clip")
    ]
    local_ray.kill(local_ray.get_actor(name, "serve"))
    for thread in threads:
        thread.join()
    assert len(found) == 16
    for scores in found:
        assert scores.failures == {}
        np.testing.assert_allclose(scores.values["clip"], here, atol=1e-4)


def test_a_service_that_is_gone_is_unavailable():
    gone = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RewardError, match="does not answer") as caught:
        RewardClient(gone).score(["clip"], IMAGES, PROMPTS)
    assert caught.value.kind == "unavailable"
    with pytest.raises(UserError, match="serve-rewards"):
        Http(Http.Config(reward="clip", url=gone)).load("cpu", 1)


def test_a_port_that_is_taken_and_a_cluster_that_is_too_small_are_told_at_once(local_ray, config):
    from align_cluster.serving.service import _fits, serving

    with socket.socket() as taken, pytest.raises(UserError, match="choose another port"):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with serving(config.model_copy(update={"port": taken.getsockname()[1], "token": None})):
            pass
    large = loads(SERVICE, "service.yaml", ["deployments.clip.cpus=64"], ServiceConfig)
    with pytest.raises(UserError, match="need 64.3 CPU"):
        _fits(large)


@pytest.mark.slow
@pytest.mark.parametrize("after, said, code", [("loading clip", "interrupted", 130), (" serves ", "finishing what", 0)])
def test_ctrl_c_ends_a_service_in_one_line(tmp_path, after, said, code):
    """As a terminal does it: every process of the group gets the signal."""
    file = tmp_path / "service.yaml"
    file.write_text(f"rewards: {{clip: {{kind: clip_score}}}}\nport: {free_port()}\n")
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "align_cluster.cli", "serve-rewards", str(file)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    service = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
    try:
        lines = []
        while not lines or after not in lines[-1]:
            lines.append(service.stdout.readline())
            assert lines[-1], "".join(lines)
        os.killpg(service.pid, signal.SIGINT)
        rest = service.communicate(timeout=300)[0]
    finally:
        if service.poll() is None:
            os.killpg(service.pid, signal.SIGKILL)
    assert rest.startswith(said) and rest.count("\n") == 1 and service.returncode == code
