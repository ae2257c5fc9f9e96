"""Every choice of a reward service in one model."""

import difflib
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import RewardSection
from align_cluster.rewards.client import Token
from align_cluster.rewards.limits import Limits
from align_cluster.settings import Root, Section, one_of

ONLY_IN_A_RUN = ("weight", "role", "on_failure", "pool")
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def _without_a_run(reward: RewardSection) -> RewardSection:
    idle = [name for name in ONLY_IN_A_RUN if name in reward.model_fields_set]
    if idle:
        raise ValueError(f"without {idle[0]}, which belongs into the run that uses the service")
    return reward


class DeploymentConfig(Section):
    """Workers of one reward: `min_replicas` at rest, up to `max_replicas` while each has more than `target_queue`
    requests waiting or in work. A worker scores up to `batch` images at once, of several requests where they wait.

    A worker is added when the queue, averaged over `upscale_s`, has been too long for `upscale_s`, and one is taken
    away when it has been short enough for `downscale_s`.
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
        if count is not None and count < info.data.get("min_replicas", 1):
            raise ValueError(f"at least min_replicas, {info.data['min_replicas']}")
        return count


class ServiceConfig(Root):
    """A reward service. `address: null` starts a Ray on this machine; "auto" joins the running one.

    The token is wanted from everybody who asks for scores; without one the service answers this machine only.
    """

    what: ClassVar[str] = "a service"
    sample: ClassVar[str] = "configs/rewards_service.yaml"

    rewards: Annotated[
        dict[
            Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")],
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
    limits: Limits = Limits()
    address: str | None = None
    start_timeout_s: PositiveFloat = 600.0

    @field_validator("deployments")
    @classmethod
    def of_rewards(cls, deployments: dict[str, DeploymentConfig], info: ValidationInfo) -> dict[str, DeploymentConfig]:
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
        host = info.data.get("host")
        if token is None and host not in (*THIS_MACHINE, None):
            raise ValueError(f"given, as env: NAME or file: PATH, because host {host} lets other machines in")
        return token

    def deployment(self, reward: str) -> DeploymentConfig:
        return self.deployments.get(reward, DeploymentConfig())
