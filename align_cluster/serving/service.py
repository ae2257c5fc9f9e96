"""Runs a reward service: a deployment of Ray Serve for each reward, asked by the HTTP side in this process.

Ray Serve's own HTTP proxy is not used, because it has no deadline for headers and no bound on connections. Needs the
extra `serve`.
"""

import align_cluster.cluster  # noqa: F401 - before ray, see there

# isort: split
import asyncio
import hashlib
import inspect
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from align_cluster import __version__
from align_cluster.cluster import sealing
from align_cluster.cluster.placement import cluster
from align_cluster.config.run import ClusterConfig
from align_cluster.errors import INTERRUPTED, UserError
from align_cluster.interrupts import SIGNALS
from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import FailurePolicy, RewardError, RewardSection
from align_cluster.rewards.http import RewardClient
from align_cluster.rewards.worker import RewardWorker
from align_cluster.serving.api import create_app
from align_cluster.serving.batching import MicroBatcher
from align_cluster.serving.config import DeploymentConfig, ServiceConfig
from align_cluster.serving.listening import bound, listening
from align_cluster.types import Prompt, Scores

APP = "align-cluster-rewards"
SAY_S = 10.0  # between two lines about the same wait
TRIES = 4  # A request whose worker dies goes to another one this often; scoring it again is harmless.
LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
ONCE = FailurePolicy(retries=0)  # The run that asks tries again, as its own policy says.


class Scorer:
    """Scores with one reward: a replica of its deployment."""

    def __init__(self, name: str, config: RewardSection, settings: DeploymentConfig, sealed: str = "") -> None:
        """Load the reward, whose name is `name`, in an environment with the sealed variables."""
        sealing.take(sealed)
        rewards = {name: config.model_copy(update={"on_failure": ONCE})}
        device = "cuda" if settings.gpus else "cpu"
        self.batcher = MicroBatcher(lambda: RewardWorker(rewards, settings.threads, device), settings.batch)

    async def score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3] with one prompt each."""
        return await self.batcher.score(images, prompts)

    async def ready(self) -> bool:
        """Answer as soon as the reward has loaded."""
        return True


class Deployments:
    """Asks the deployments of the rewards. It is the backend of the app."""

    def __init__(self, handles: dict[str, Any]) -> None:
        """Keep the handle of each reward's deployment."""
        self.handles = handles

    async def score(self, reward: str, images: np.ndarray, prompts: list[Prompt]) -> Scores:
        """Score with one reward. A request whose worker dies goes to another one; RewardError where TRIES died."""
        for wait in range(TRIES):
            try:
                return await self.handles[reward].score.remote(images, prompts)
            except LOST as error:
                lost = error
                await asyncio.sleep(0.2 * 2**wait)
        raise RewardError("unavailable", f"lost {TRIES} workers in a row: {str(lost).splitlines()[0]}")

    async def unready(self) -> list[str]:
        """Return the names of the rewards without a worker that answers within 5 s."""

        async def ready(name: str) -> bool:
            async with asyncio.timeout(5):
                return await self.handles[name].ready.remote()

        answers = await asyncio.gather(*map(ready, self.handles), return_exceptions=True)
        return [name for name, answer in zip(self.handles, answers, strict=True) if answer is not True]


def describe(rewards: Mapping[str, RewardSection]) -> list[dict[str, object]]:
    """Tell clients about each reward. Its version changes with the package and with its own settings.

    An end of the range is None where nothing bounds the score.
    """
    described = []
    for name, config in rewards.items():
        own = config.model_dump(mode="json", exclude=set(RewardSection.model_fields))
        kind, digest = REWARDS[config.kind], hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]
        described.append(
            {
                "name": name,
                "kind": config.kind,
                "about": inspect.cleandoc(kind.__doc__ or ""),
                "range": list(kind(config).bounds),
                "inputs": {"images": "RGB, 8 bits", "prompts": "text", "metadata": dict(kind.metadata)},
                "needs": kind.needs,
                "version": f"{__version__}+{digest}",
            }
        )
    return described


def deployment(config: ServiceConfig, name: str, sealed: str) -> Any:
    """Return the Serve application of one reward: its workers, with the variables that are sealed for them."""
    settings = config.deployment(name)
    autoscaling = AutoscalingConfig(
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas or settings.min_replicas,
        target_ongoing_requests=settings.target_queue,
        upscale_delay_s=settings.upscale_s,
        downscale_delay_s=settings.downscale_s,
        look_back_period_s=settings.upscale_s,
        metrics_interval_s=min(10.0, settings.upscale_s / 3),
    )
    return serve.deployment(
        Scorer,
        name=name,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=max(settings.batch, int(2 * settings.target_queue)),
        health_check_period_s=settings.health_check_s,
        graceful_shutdown_timeout_s=settings.drain_s,
        max_constructor_retry_count=1,
        autoscaling_config=autoscaling,
    ).bind(name, config.rewards[name], settings, sealed)


def app_name(reward: str) -> str:
    """Return the name of the Serve application of a reward; its deployment has the reward's name."""
    return f"{APP}.{reward}"


@contextmanager
def serving(config: ServiceConfig, say: Callable[[str], None] = lambda text: None) -> Iterator[str]:
    """Run the service for the length of a with block, and yield its URL once every reward answers.

    The service finishes what it has in work before it ends. `say` is told what the start waits for. UserError says why
    the service cannot start.
    """
    token = config.token.read() if config.token else None
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with closing(_bound(config)) as listener:
        say(f"joining the Ray at {config.address}" if config.address else "starting Ray")
        with _deployed(config) as backend:
            app = create_app(
                backend,
                describe(config.rewards),
                limits=config.limits,
                token=hashlib.sha256(token.encode()).digest() if token else None,
                without_token=config.without_token,
            )
            with listening(app, listener, config.limits):
                url = _url(config)
                _wait_until_ready(config, url, say)
                yield url


@contextmanager
def _deployed(config: ServiceConfig) -> Iterator[Deployments]:
    """Deploy the rewards on Ray for the length of a with block, without waiting until they have loaded."""
    own = not (config.address or os.environ.get("RAY_ADDRESS") or ray.is_initialized())
    with cluster(ClusterConfig(address=config.address)):
        _fits(config)
        serve.start(proxy_location="Disabled")
        sealed = sealing.seal_for(config.address, ())
        targets = [
            serve.RunTarget(deployment(config, name, sealed), name=app_name(name), route_prefix=None)
            for name in config.rewards
        ]
        try:
            handles = serve.run_many(targets, wait_for_applications_running=False)
            yield Deployments(dict(zip(config.rewards, handles, strict=True)))
        finally:
            if not own:  # A Ray of this service ends with all that it serves.
                _remove(config)


def _remove(config: ServiceConfig) -> None:
    """Delete the rewards' applications, and Ray Serve where nobody else uses it."""
    worker = ray._private.worker
    printer, worker.print_to_stdstream = worker.print_to_stdstream, lambda *_, **__: None
    try:
        for wait in (False, True):  # they end together, also where this process does not live to see it
            for name in config.rewards:
                serve.delete(app_name(name), _blocking=wait)
        if not serve.status().applications:
            serve.shutdown()  # Ray tells of each call that waited for the controller.
    finally:
        worker.print_to_stdstream = printer


def run(config: ServiceConfig) -> None:
    """Run the service until the process is told to end, and then finish what has begun; told again, end at once."""
    end = threading.Event()

    def stop(*_: Any) -> None:
        if end.is_set():
            os._exit(INTERRUPTED)
        end.set()

    with serving(config, lambda text: print(text, flush=True)) as url:
        for number in SIGNALS:
            signal.signal(number, stop)
        print(f"{url} serves {', '.join(config.rewards)}; documentation at {url}/docs, Ctrl-C ends it", flush=True)
        end.wait()
        print("finishing what has begun; Ctrl-C again ends it at once", flush=True)


def _fits(config: ServiceConfig) -> None:
    total = ray.cluster_resources()
    shares = [config.deployment(name) for name in config.rewards]
    for kind, asked in (("CPU", "cpus"), ("GPU", "gpus")):
        need = sum(getattr(share, asked) * share.min_replicas for share in shares)
        if need > total.get(kind, 0) + 1e-6:
            raise UserError(
                f"deployments need {need:g} {kind} for their min_replicas, and the cluster has {total.get(kind, 0):g}: "
                f"lower {asked} or min_replicas (a fraction is fine), or join a larger cluster with address"
            )


def _bound(config: ServiceConfig) -> socket.socket:
    try:
        return bound(config.host, config.port)
    except OSError as error:
        raise UserError(
            f"host {config.host}, port {config.port} cannot be served at ({error}); choose another port"
        ) from None


def _url(config: ServiceConfig) -> str:
    host = ray.util.get_node_ip_address() if config.host in ("0.0.0.0", "::") else config.host
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


def _wait_until_ready(config: ServiceConfig, url: str, say: Callable[[str], None]) -> None:
    client, began, told, due = RewardClient(url, timeout_s=10), time.monotonic(), "", 0.0
    while True:
        status = serve.status().applications
        for name in config.rewards:
            if status[app_name(name)].status == "DEPLOY_FAILED":
                raise UserError(f"the service cannot start: {_reason(status[app_name(name)])}")
        loading = [name for name in config.rewards if status[app_name(name)].status != "RUNNING"]
        waits_for, late = f"loading {', '.join(loading)}", ""
        if not loading:
            try:
                client.ready()
                return
            except RewardError as error:
                waits_for, late = f"waiting for {url}", f" ({error})"
        waited = time.monotonic() - began
        if waited > config.start_timeout_s:
            raise UserError(
                f"the service was not ready within start_timeout_s, {config.start_timeout_s:g} s: {waits_for}{late}"
            )
        if waits_for != told or waited > due:
            say(f"{waits_for}, since {waited:.0f} s{late}" if waited >= 1 else waits_for)
            told, due = waits_for, waited + SAY_S
        time.sleep(0.2)


def _reason(status: Any) -> str:
    """Return the user's error in what Ray tells about a failed start, or its last line."""
    text = "\n".join([status.message, *(deployment.message for deployment in status.deployments.values())])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line.partition("UserError: ")[2] for line in lines if "UserError: " in line]
    return (said or lines or ["no reason is known"])[-1]
