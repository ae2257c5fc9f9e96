"""Every choice of a reward service in one model. configs/rewards_service.yaml is an example."""

import difflib
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from align_cluster.kinds import one_of
from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import RewardSection
from align_cluster.rewards.http import Token
from align_cluster.settings import Name, Root, Section

ONLY_IN_A_RUN = ("weight", "role", "on_failure", "pool")
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def _without_a_run(reward: RewardSection) -> RewardSection:
    idle = [name for name in ONLY_IN_A_RUN if name in reward.model_fields_set]
    if idle:
        raise ValueError(f"without {idle[0]}, which belongs into the run that uses the service")
    return reward


class Limits(Section):
    """Bounds what a service takes from strangers.

    A request takes up to twice `body_bytes` of memory, with images in base64 three times, and 3 bytes for each of
    `request_pixels`.
    """

    body_bytes: PositiveInt = 128 * 2**20
    """The most bytes of a request's body. A larger one is refused with 413."""
    json_bytes: PositiveInt = 2**20
    """The most bytes of JSON in a request, without the images that flow_grpo's requests hold in base64."""
    images: PositiveInt = 64
    """The most images in one request. Clients with more send several requests."""
    image_pixels: PositiveInt = 2048 * 2048
    """The most pixels of one image, height times width. The default lets 2048 x 2048 in."""
    request_pixels: PositiveInt = 2**25
    """The most pixels of all images of a request together."""
    prompt_chars: PositiveInt = 4096
    """The most characters of one prompt."""
    concurrency: PositiveInt = 32
    """The most requests that are read or scored at once. A further one is refused with 429, and its client may try
    again. Memory has to hold the bodies and pixels of all of them."""
    connections: PositiveInt = 256
    """The most connections at once. The one that has been idle for longest gives way to a new one."""
    header_timeout_s: PositiveFloat = 10.0
    """The seconds from the connection, or from an answer, to the end of the next request's headers."""
    body_timeout_s: PositiveFloat = 30.0
    """The seconds that the body of a request has to arrive. A later one is refused with 408."""
    score_timeout_s: PositiveFloat = 120.0
    """The seconds that a reward has to score a request, waiting included. A reward over them answers with a failure of
    kind timeout; the others keep their scores."""


class DeploymentConfig(Section):
    """Sets the workers of one reward, whose number Ray Serve fits to the load."""

    min_replicas: PositiveInt = 1
    """The number of workers at rest. The cluster must have room for those of all rewards at the start."""
    max_replicas: PositiveInt | None = None
    """The most workers under load. null means `min_replicas`, so the number is fixed."""
    target_queue: PositiveFloat = 4.0
    """The number of requests a worker, waiting or in work, that Ray Serve aims at. It adds workers above, and takes
    them away below. Lower it for shorter waits."""
    upscale_s: PositiveFloat = 30.0
    """The seconds that a worker must have had more than `target_queue` requests before one is added."""
    downscale_s: PositiveFloat = 600.0
    """The seconds that a worker must have had fewer than `target_queue` requests before one is taken away. A long time
    keeps workers whose models are slow to load."""
    batch: PositiveInt = 16
    """The most images that a worker scores at once, of several requests where they wait. Lower it where the worker's
    memory is short."""
    cpus: PositiveFloat = 1.0
    """The CPU cores that Ray reserves for each worker; a fraction is fine. It only reserves room: `threads` limits what
    a worker uses."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """The GPUs that each worker takes; a fraction shares one GPU among workers. 0 scores on the CPU."""
    threads: PositiveInt = 1
    """The CPU threads that each worker computes with. Keep it close to `cpus`."""
    health_check_s: PositiveFloat = 10.0
    """The seconds between Ray Serve's checks that a worker is alive. A dead one is replaced."""
    drain_s: PositiveFloat = 30.0
    """The seconds that a worker has to finish what it has begun before it is stopped."""

    @field_validator("max_replicas")
    @classmethod
    def not_below_the_minimum(cls, count: int | None, info: ValidationInfo) -> int | None:
        """Refuse fewer workers at most than at least."""
        if count is not None and count < info.data.get("min_replicas", 1):
            raise ValueError(f"at least min_replicas, {info.data['min_replicas']}")
        return count


class ServiceConfig(Root):
    """Describes a reward service, which scores images over HTTP for many runs.

    Whoever asks must give the token, for all but `/healthz`, `/readyz` and what `without_token` opens. A service
    without a token answers this machine only.
    """

    what: ClassVar[str] = "a service"
    sample: ClassVar[str] = "configs/rewards_service.yaml"

    rewards: Annotated[
        dict[
            Name,
            Annotated[
                one_of(REWARDS, lambda reward: not reward.remote),
                AfterValidator(_without_a_run),
            ],
        ],
        Field(min_length=1),
    ]
    """The rewards by the names that clients ask for. Each is as in a run file, without weight, role, on_failure and
    pool, which belong to the run. The kind http is not possible here."""
    deployments: dict[str, DeploymentConfig] = {}
    """The workers of each reward, by the names of `rewards`. A reward that is not named has one worker with one CPU
    core."""
    host: str = "127.0.0.1"
    """The address that the service listens at. The default lets only this machine in; 0.0.0.0 lets others in too, and
    then a token must be given."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """The port that the service listens at."""
    token: Annotated[Token | None, Field(validate_default=True)] = None
    """Where the token is that clients must give. null asks for none, which is possible only where `host` is this
    machine."""
    without_token: tuple[Literal["docs", "metrics"], ...] = ()
    """What is open to those without the token: `docs` are /docs and /openapi.json, and `metrics` is /metrics."""
    limits: Limits = Limits()
    """What a request may hold and how long it may take."""
    address: str | None = None
    """The Ray cluster that runs the workers: null starts one on this machine, and "auto" joins the running one. The
    address of another cluster joins that."""
    start_timeout_s: PositiveFloat = 600.0
    """The seconds after the start by which every reward must answer. Raise it where models are downloaded first."""

    @field_validator("deployments")
    @classmethod
    def of_rewards(cls, deployments: dict[str, DeploymentConfig], info: ValidationInfo) -> dict[str, DeploymentConfig]:
        """Refuse deployments of rewards that the service does not have."""
        names = info.data.get("rewards", deployments)
        for name in deployments:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
                raise ValueError(f"a mapping by names of rewards, and {name!r} is none ({hint})")
        return deployments

    @field_validator("token")
    @classmethod
    def wanted_by_others(cls, token: Token | None, info: ValidationInfo) -> Token | None:
        """Refuse a service without a token that other machines can reach."""
        host = info.data.get("host")
        if token is None and host not in (*THIS_MACHINE, None):
            raise ValueError(f"given, as env: NAME or file: PATH, because host {host} lets other machines in")
        return token

    def deployment(self, reward: str) -> DeploymentConfig:
        """Return how the reward is deployed."""
        return self.deployments.get(reward, DeploymentConfig())
