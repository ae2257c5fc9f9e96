"""What a user reads where the hub refuses a model: a hub on this machine, which says what the real one says."""

import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from align_cluster.backbones.sd3 import SD3
from align_cluster.errors import UserError
from align_cluster.rewards.hps import Hps


class Refuses(BaseHTTPRequestHandler):
    """The hub's answers to whoever has no access: of a gated model, and of all others."""

    def do_HEAD(self):
        self.send_response(401)
        gated = "/gated/" in self.path
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access to this model is restricted." if gated else "Repository not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[None]:
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template[template.index("/{repo_id}") :])
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name, why", [("gated/model", "it is gated; accept its terms"), ("a/b", "it is private")])
def test_a_model_that_the_hub_refuses_says_why_and_whose_environment_counts(hub, monkeypatch, name, why):
    loads = (lambda: SD3(SD3.Config(path=name)).index, lambda: Hps(Hps.Config(path=name)).load("cpu", 1))
    for load in loads:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        with pytest.raises(UserError) as caught:
            load()
        whose = f"the environment of this process on {os.uname().nodename}"
        assert why in str(caught.value) and f"HF_TOKEN is not set in {whose}" in str(caught.value)
        assert "submit --env HF_TOKEN" in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    with pytest.raises(UserError, match="HF_TOKEN has no access") as caught:
        load()
    assert "hf_of_the_tests" not in str(caught.value)
