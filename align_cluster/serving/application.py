"""The reward service as a Serve application, for a Ray Serve that somebody else runs, such as KubeRay's RayService.

`serve-rewards` runs its HTTP side in its own process, with deadlines for connections. Here Ray Serve's proxy takes its
place, so whatever stands before it (an ingress, a gateway) has to bound connections and the time for headers.
"""

import align_cluster.cluster  # noqa: F401 - before ray, see there

# isort: split
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve

from align_cluster.config.check import check_settings
from align_cluster.config.load import load
from align_cluster.errors import UserError
from align_cluster.serving.api import create_app
from align_cluster.serving.config import ServiceConfig
from align_cluster.serving.service import Deployments, deployment, describe
from align_cluster.settings import Section


async def _asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Hand a request to the app of the replica that this runs in; Ray Serve wants the app before there is a replica."""
    if scope["type"] == "lifespan":  # comes before there is a replica; the app has nothing to do then
        while True:
            told = (await receive())["type"]
            await send({"type": f"{told}.complete"})
            if told == "lifespan.shutdown":
                return
    await serve.get_replica_context().servable_object.routes(scope, receive, send)


def _app() -> Callable[..., Awaitable[None]]:
    """Return the app; Ray Serve calls whatever function it is given."""
    return _asgi


@serve.deployment(name="http", max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
@serve.ingress(_app)
class HttpSide:
    """Answers the routes of api.py; the rewards' workers compute the scores."""

    def __init__(self, config: ServiceConfig, handles: dict[str, Any]) -> None:
        """Read the service's token in the environment of this replica."""
        token = config.token.read() if config.token else None
        self.routes = create_app(
            Deployments(handles),
            describe(config.rewards),
            limits=config.limits,
            token=hashlib.sha256(token.encode()).digest() if token else None,
            without_token=config.without_token,
        )


class Arguments(Section):
    """The `args` of the application: a service file's path, and overrides such as `deployments.clip.cpus=2`."""

    config: str
    set: tuple[str, ...] = ()


def application(arguments: Arguments) -> serve.Application:
    """Build the application; Ray Serve calls this with its `args`.

    Raises UserError for mistakes in the file, and for a service without a token: Ray Serve lets other machines in.
    """
    config = load(arguments.config, arguments.set, ServiceConfig)
    check_settings(config)
    if config.token is None:
        raise UserError(
            f"{arguments.config}: token is missing, and Ray Serve lets other machines in; give token={{env: NAME}}"
        )
    return HttpSide.bind(config, {name: deployment(config, name, "") for name in config.rewards})
