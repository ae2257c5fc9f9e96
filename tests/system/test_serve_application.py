"""The reward service as an application of a Ray Serve that others run, as KubeRay's RayService does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from align_cluster.errors import UserError
from align_cluster.rewards.worker import RewardWorker
from align_cluster.serving.config import ServiceConfig
from align_cluster.types import Prompt

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

MANIFEST = Path(__file__).parents[2] / "deploy" / "kuberay" / "base" / "rayservice.yaml"

# What RayService does: it hands its serveConfigV2 to its cluster, whose Serve controller imports the application.
RUN = """
import json, sys, time
import numpy as np
from align_cluster.cluster import private
from align_cluster.rewards.base import RewardError
from align_cluster.rewards.http import RewardClient, Unauthorized
from align_cluster.types import Prompt
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema

described, port = json.loads(sys.argv[1]), int(sys.argv[2])
private.start(num_cpus=4, log_to_driver=False, logging_level="error")
described["http_options"] |= {"host": "127.0.0.1", "port": port}
client = serve_start(proxy_location="HeadOnly", http_options=described["http_options"])
client.deploy_apps(ServeDeploySchema.model_validate(described), _blocking=False)
url, state = f"http://127.0.0.1:{port}", None
while not state or state.status != "RUNNING":  # longer than a minute, on a busy machine
    state = serve.status().applications.get("rewards")
    assert not state or state.status != "DEPLOY_FAILED", state
    time.sleep(0.5)
asks = RewardClient(url, "a-secret-of-the-tests")
asks.ready()
prompts = [Prompt(0, "a photo of a red circle", {})]
scores = asks.score(["clip"], np.full((1, 64, 64, 3), 90, np.uint8), prompts)
try:
    RewardClient(url, "another").rewards()
    refused = False
except Unauthorized:
    refused = True
print("found", json.dumps([float(scores.values["clip"][0]), refused]))
serve.shutdown()
"""


@pytest.mark.exhaustive
def test_the_manifests_application_serves_the_same_scores_and_asks_for_its_token(tmp_path, monkeypatch):
    config_map, service = yaml.safe_load_all(MANIFEST.read_text())
    (tmp_path / "service.yaml").write_text(config_map["data"]["service.yaml"])
    described = yaml.safe_load(service["spec"]["serveConfigV2"])
    described["applications"][0]["args"]["config"] = str(tmp_path / "service.yaml")
    monkeypatch.setenv("REWARDS_TOKEN", "a-secret-of-the-tests")
    from .test_reward_service import free_port

    command = [sys.executable, "-c", RUN, json.dumps(described), str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    found = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    assert found, done.stdout + done.stderr
    there, refused = json.loads(found[0].partition(" ")[2])
    config = ServiceConfig.model_validate(yaml.safe_load(config_map["data"]["service.yaml"]))
    here = RewardWorker({"clip": config.rewards["clip"]})
    scores = here.score(np.full((1, 64, 64, 3), 90, np.uint8), [Prompt(0, "a photo of a red circle", {})])
    assert there == pytest.approx(float(scores.values["clip"][0]), rel=1e-6) and refused


def test_a_service_that_ray_serve_would_open_to_all_is_refused_without_a_token():
    from align_cluster.serving.application import Arguments, application

    with pytest.raises(UserError, match="rewards_service: token is missing, and Ray Serve lets other machines in"):
        application(Arguments(config="rewards_service"))
    with pytest.raises(UserError, match="gone.yaml does not exist"):
        application(Arguments(config="gone.yaml"))
    built = application(Arguments(config="rewards_service", set=("token={env: REWARDS_TOKEN}",)))
    assert built._bound_deployment.name == "http"
