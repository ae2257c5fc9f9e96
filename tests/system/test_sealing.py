"""Secrets reach a run's driver and its workers, and nothing writes them down."""

import json
import os
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from threading import Thread
from typing import ClassVar

import pytest

from align_cluster.cli import main
from align_cluster.cluster import sealing
from align_cluster.cluster.actors import make_learner_rank, make_reward_worker
from align_cluster.config.load import load
from align_cluster.config.plan import derive
from align_cluster.errors import UserError

from .conftest import TINY

NAME, VALUE = "SERVICE_TOKEN_OF_THE_TESTS", "hunter2-of-the-tests"
FAR = f"rewards.far={{kind: http, url: 'http://10.0.0.5:8000', reward: clip, token: {{env: {NAME}}}}}"


@pytest.fixture
def far(monkeypatch):
    """A run on a cluster with a reward behind a token, which is set here."""
    monkeypatch.setenv(NAME, VALUE)
    return load(TINY, [FAR, "cluster.address=auto"])


def test_a_token_that_the_driver_lacks_ends_train_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(NAME, raising=False)
    assert main(["train", str(TINY), "--set", FAR, f"out={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert f"error: rewards.far.token.env: {NAME} is not set in the environment of the run's driver" in said
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(sealing.IN_A_JOB, "{}")
    assert main(["train", str(TINY), "--set", FAR, f"out={tmp_path}"]) == 2
    assert f"a Ray job on {os.uname().nodename}; `submit --env {NAME}` sends yours" in capsys.readouterr().err


def test_what_is_sealed_shows_nothing_and_opens_with_the_same_ray_token_alone(monkeypatch):
    monkeypatch.setattr(sealing, "_ray_token", lambda: "one")
    sealed = sealing.seal({NAME: VALUE})
    assert VALUE not in sealed and NAME not in sealed and "$" not in sealed  # Ray expands $ in a job's variables
    assert sealing.opened(sealed) == {NAME: VALUE} and sealing.opened("") == {}
    monkeypatch.setattr(sealing, "_ray_token", lambda: "another")
    with pytest.raises(UserError, match=f"sealed with another Ray token than {os.uname().nodename} has"):
        sealing.opened(sealed)


def test_the_driver_takes_what_submit_sent_and_hands_it_on_with_the_hubs_token(far, monkeypatch):
    monkeypatch.setattr(sealing, "_ray_token", lambda: "one")
    monkeypatch.setenv(sealing.SEALED, sealing.seal({NAME: "sent", "OTHER_OF_THE_TESTS": "sent too"}))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    monkeypatch.setenv("OTHER_OF_THE_TESTS", "stale")
    sealing.check(far)
    sent = {NAME: "sent", "OTHER_OF_THE_TESTS": "sent too", "HF_TOKEN": "hf_of_the_tests"}
    assert sealing.opened(sealing.for_workers(far)) == sent


def test_a_worker_on_a_cluster_has_the_drivers_variable(local_ray, by_value, far):
    rank = make_learner_rank(derive(far, 2, 0), "DEFAULT")
    assert local_ray.get(rank.__ray_call__.remote(lambda _: os.environ.get(NAME))) == VALUE
    local_ray.kill(rank)


def test_a_runs_reward_workers_know_its_name(local_ray, by_value, tiny):
    config = tiny("nft")
    plan = derive(config, 2, 0)
    worker = make_reward_worker(config, plan, replace(plan.reward_pools[0], cpus=0.01), None)
    jobs = local_ray.get(worker.__ray_call__.remote(lambda self: {reward.job for reward in self.rewards.values()}))
    assert jobs == {config.name}
    local_ray.kill(worker)


def test_where_nothing_can_be_sealed_the_nodes_that_lack_a_variable_are_named(local_ray, far, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert sealing.for_workers(far) == ""
    node = local_ray.nodes()[0]["NodeManagerAddress"]
    with pytest.raises(UserError, match=f"{NAME} is set for the run's driver, and not for Ray's workers on {node}"):
        sealing.check_workers(far)


class Dashboard(BaseHTTPRequestHandler):
    """Answers as the dashboard of a cluster without a token does, and keeps the headers that came."""

    seen: ClassVar[list[dict[str, str]]] = []

    def do_GET(self):
        self.seen.append(dict(self.headers))
        body = json.dumps({"version": "4", "ray_version": version("ray"), "ray_commit": ""}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_cluster_without_a_token_is_sent_no_secret(monkeypatch, capsys):
    monkeypatch.setenv(NAME, VALUE)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # which asking the cluster changes
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"X-Proxy": "let me in"}')
    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        command = [
            "submit",
            str(TINY),
            "--out",
            "/x",
            "--address",
            f"http://127.0.0.1:{server.server_port}",
            "--set",
            FAR,
        ]
        assert main([*command, "--env", NAME]) == 2
    finally:
        server.shutdown()
        server.server_close()
    assert f"--env {NAME}: this cluster asks for no token" in capsys.readouterr().err
    assert Dashboard.seen and all(headers.get("X-Proxy") == "let me in" for headers in Dashboard.seen)
    monkeypatch.setenv("RAY_JOB_HEADERS", "X-Proxy: let me in")
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"note: the run reads the cluster's own {NAME}; --env {NAME} sends yours" in said
    assert "RAY_JOB_HEADERS is no JSON object" in said


def test_submit_refuses_to_send_what_is_not_set_here(monkeypatch, capsys):
    monkeypatch.delenv(NAME, raising=False)
    command = ["submit", str(TINY), "--out", "/x", "--address", "http://127.0.0.1:1", "--env", NAME]
    assert main(command) == 2
    assert (
        capsys.readouterr().err == f"error: --env {NAME}: {NAME} is not set in the environment of this command; "
        "export it first\n"
    )
