"""A service whose workers come, go and die while it is asked."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from align_cluster.config.load import loads
from align_cluster.embedded import scene
from align_cluster.embedded.render import render
from align_cluster.rewards.base import RewardError
from align_cluster.rewards.http import RewardClient
from align_cluster.rewards.worker import RewardWorker
from align_cluster.serving.config import ServiceConfig
from align_cluster.types import Prompt

from .test_reward_service import free_port

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytestmark = pytest.mark.exhaustive

RECORDS = scene.prompts("colors", "held_out")[:8]
IMAGES = render(RECORDS, 1).permute(0, 2, 3, 1).numpy()
PROMPTS = [Prompt(i, record["prompt"], record) for i, record in enumerate(RECORDS)]
SERVICE = """\
rewards:
  steady: {kind: clip_score}
  elastic: {kind: clip_score}
deployments:
  steady: {min_replicas: 2, cpus: 0.2, batch: 8, health_check_s: 1}
  elastic: {min_replicas: 1, max_replicas: 2, target_queue: 1, upscale_s: 1.5, downscale_s: 2, cpus: 0.2, batch: 8}
limits: {images: 512}
start_timeout_s: 120
"""


@pytest.fixture(scope="module")
def service(local_ray: Any) -> Iterator[tuple[str, ExitStack]]:
    """The URL, and what closing ends the service."""
    from align_cluster.serving.service import serving

    config = loads(SERVICE, "service.yaml", [f"port={free_port()}"], ServiceConfig)
    with ExitStack() as stack:
        yield stack.enter_context(serving(config)), stack


@pytest.fixture(scope="module")
def here() -> np.ndarray:
    """Scores of IMAGES."""
    config = loads(SERVICE, "service.yaml", (), ServiceConfig)
    return RewardWorker({"steady": config.rewards["steady"]}).score(IMAGES, PROMPTS).values["steady"]


class Load:
    """Threads that ask for scores, each again and again, until the context ends; `found` are the answers."""

    def __init__(self, url: str, reward: str, clients: int) -> None:
        self.client, self.reward = RewardClient(url, encoding="raw", timeout_s=60), reward
        self.found: list[Any] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.ask) for _ in range(clients)]

    def ask(self) -> None:
        while not self.over.is_set():
            try:
                self.found.append(self.client.score([self.reward], IMAGES, PROMPTS))
            except RewardError as error:
                self.found.append(error)

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def check(self, here: np.ndarray) -> None:
        for scores in self.found:
            assert not isinstance(scores, RewardError), scores
            assert scores.failures == {}
            np.testing.assert_allclose(scores.values[self.reward], here, atol=1e-4)


def replicas(ray: Any, reward: str) -> list[str]:
    """Names of the actors of a reward that run."""
    start = f"SERVE_REPLICA::align-cluster-rewards.{reward}#{reward}#"
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if name.startswith(start)]


def wait_for(reward: str, count: int, seconds: float) -> None:
    """Until the reward has so many workers, and all run."""
    from ray import serve

    started = time.monotonic()
    while True:
        states = serve.status().applications[f"align-cluster-rewards.{reward}"].deployments[reward].replica_states
        if states == {"RUNNING": count}:
            return
        assert time.monotonic() - started < seconds, states
        time.sleep(0.2)


def test_one_of_two_workers_is_killed_under_load_and_no_request_is_lost(local_ray, service, here):
    before = replicas(local_ray, "steady")
    assert len(before) == 2
    with Load(service[0], "steady", clients=4) as load:
        time.sleep(1)
        local_ray.kill(local_ray.get_actor(before[0], "serve"))
        time.sleep(3)
    assert len(load.found) > 20
    load.check(here)
    wait_for("steady", 2, seconds=120)
    assert before[0] not in replicas(local_ray, "steady")


def test_a_worker_comes_with_the_load_and_goes_with_it(local_ray, service, here):
    wait_for("elastic", 1, seconds=5)
    with Load(service[0], "elastic", clients=6) as load:
        wait_for("elastic", 2, seconds=120)
    load.check(here)
    wait_for("elastic", 1, seconds=120)


def test_what_is_in_work_at_the_end_of_a_service_is_finished(service, here):
    """Has to be the last one here."""
    url, stack = service
    many, prompts, found = np.repeat(IMAGES, 64, 0), [p for p in PROMPTS for _ in range(64)], []
    client = RewardClient(url, encoding="raw")
    thread = threading.Thread(target=lambda: found.append(client.score(["steady"], many, prompts)))
    thread.start()
    time.sleep(0.3)
    assert not found
    stack.close()
    thread.join()
    np.testing.assert_allclose(found[0].values["steady"], np.repeat(here, 64), atol=1e-4)
    with pytest.raises(RewardError, match="does not answer"):
        client.ready()
