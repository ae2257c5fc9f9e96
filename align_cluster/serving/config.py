"""Every choice of a reward service in one model. configs/rewards_service.yaml is an example."""

import difflib
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import RewardSection
from align_cluster.rewards.http import Token
from align_cluster.settings import Name, Root, Section, one_of

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
    json_bytes: PositiveInt = Field(2**20, description="without what base64 takes in flow_grpo's requests")
    images: PositiveInt = Field(64, description="in one request")
    image_pixels: PositiveInt = 2048 * 2048
    request_pixels: PositiveInt = 2**25
    prompt_chars: PositiveInt = 4096
    concurrency: PositiveInt = Field(32, description="requests that are read or scored at once")
    connections: PositiveInt = Field(256, description="at once; the longest idle one gives way to a new one")
    header_timeout_s: PositiveFloat = Field(10.0, description="from the connection to the end of the headers")
    body_timeout_s: PositiveFloat = Field(30.0, description="for the body to arrive")
    score_timeout_s: PositiveFloat = Field(120.0, description="for a reward to score it, waiting included")


class DeploymentConfig(Section):
    """Sets the workers of one reward: `min_replicas` at rest, and up to `max_replicas` under load.

    Ray Serve adds a worker when more than `target_queue` requests a worker have been waiting or in work for
    `upscale_s`, and it takes one away when there have been fewer for `downscale_s`. A worker scores up to `batch`
    images at once, of several requests where they wait.
    """

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt | None = Field(None, description="null: as min_replicas")
    target_queue: PositiveFloat = 4.0
    upscale_s: PositiveFloat = 30.0
    downscale_s: PositiveFloat = 600.0
    batch: PositiveInt = 16
    cpus: PositiveFloat = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    threads: PositiveInt = 1
    health_check_s: PositiveFloat = 10.0
    drain_s: PositiveFloat = Field(30.0, description="for what a worker has begun, before it is stopped")

    @field_validator("max_replicas")
    @classmethod
    def not_below_the_minimum(cls, count: int | None, info: ValidationInfo) -> int | None:
        """Refuse fewer workers at most than at least."""
        if count is not None and count < info.data.get("min_replicas", 1):
            raise ValueError(f"at least min_replicas, {info.data['min_replicas']}")
        return count


class ServiceConfig(Root):
    """Describes a reward service. `address: null` starts a Ray on this machine; "auto" joins the running one.

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
    deployments: dict[str, DeploymentConfig] = {}
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    token: Annotated[Token | None, Field(validate_default=True)] = None
    without_token: Annotated[
        tuple[Literal["docs", "metrics"], ...], Field(description="docs: /docs and /openapi.json; metrics: /metrics")
    ] = ()
    limits: Limits = Limits()
    address: str | None = None
    start_timeout_s: PositiveFloat = 600.0

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
