"""A reward that a service computes: `align-cluster serve-rewards` on another machine, shared by many runs."""

import math
from typing import Literal

import numpy as np
from pydantic import Field, PositiveFloat, ValidationInfo, field_validator

from align_cluster.errors import UserError
from align_cluster.rewards.base import Result, Reward, RewardError, RewardSection
from align_cluster.rewards.client import RewardClient, Token, address
from align_cluster.rewards.wire import Encoding
from align_cluster.types import Prompt


class Http(Reward):
    """Sends the images and prompts to a service. Its failures keep their kind, so `on_failure` treats them as if the
    reward ran here."""

    remote = True

    class Config(RewardSection):
        """`reward` is the name at the service. `raw` sends more bytes than `png` and takes less time to pack.

        The token is read where rewards run: the variable or the file has to be there. With `hedge_s`, images that have
        no scores after so many seconds are sent once more, and the first answer counts: p99 is a good choice.
        """

        kind: Literal["http"] = "http"
        url: str
        reward: str
        token: Token | None = None
        timeout_s: PositiveFloat = 60.0
        hedge_s: PositiveFloat | None = Field(None, description="null: never")
        encoding: Encoding = "png"

        @field_validator("url")
        @classmethod
        def is_an_address(cls, url: str) -> str:
            address(url)
            return url

        @field_validator("hedge_s")
        @classmethod
        def before_the_end(cls, seconds: float | None, info: ValidationInfo) -> float | None:
            if seconds is not None and seconds >= info.data.get("timeout_s", math.inf):
                raise ValueError(f"below timeout_s, {info.data['timeout_s']:g}")
            return seconds

    def load(self, device: str, threads: int) -> None:
        config = self.config
        token = config.token.read() if config.token else None
        self.client = RewardClient(config.url, token, config.timeout_s, config.encoding, config.hedge_s)
        try:
            served = self.client.rewards()
        except RewardError as error:
            raise UserError(
                f"the reward service cannot be used ({error}); correct url or token, or start one with "
                "`align-cluster serve-rewards`"
            ) from None
        if config.reward not in served:
            raise UserError(f"{config.url} has no reward {config.reward!r}; it has {', '.join(served)}")

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Result:
        name = self.config.reward
        scores = self.client.score([name], images, prompts)
        if name in scores.failures:
            raise RewardError(scores.failures[name].kind, scores.failures[name].message)
        details = {detail.removeprefix(f"{name}/"): column for detail, column in scores.details.items()}
        return Result(scores.values[name], scores.valid[name], details)
