"""A reward service without Ray, in a process of its own: `serving.py LIMITS_AS_JSON TOKEN` prints its port.

One reward is right; the others return what no reward may.
"""

import asyncio
import hashlib
import sys
from typing import Literal

import numpy as np
import uvicorn

from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import FailurePolicy, Result, Reward, RewardSection
from align_cluster.rewards.worker import RewardWorker
from align_cluster.serving.api import create_app
from align_cluster.serving.batching import MicroBatcher
from align_cluster.serving.config import Limits


class Returns(Reward):
    """An image's first byte, or what `what` says."""

    class Config(RewardSection):
        kind: Literal["returns"] = "returns"
        what: str

    def load(self, device, threads):
        pass

    def score(self, images, prompts):
        bright = images[:, 0, 0, 0].astype(np.float64)
        valid = np.ones(len(images), bool)
        return {
            "bright": lambda: Result(bright, valid, {"accuracy": bright, "strict": -bright}),
            "nan": lambda: Result(bright * np.nan, valid),
            "inf": lambda: Result(bright + np.inf, valid),
            "shape": lambda: Result(bright[:, None], valid),
            "short": lambda: Result(bright[1:], valid[1:]),
            "words": lambda: Result(np.array(["good"] * len(images)), valid),
            "nothing": lambda: None,
            "inf_detail": lambda: Result(bright, valid, {"ratio": bright * np.inf}),
            "raises": lambda: prompts[0].metadata["missing"],
        }[self.config.what]()


NAMES = "bright nan inf shape short words nothing inf_detail raises".split()


class Backend:
    def __init__(self):
        REWARDS["returns"] = Returns
        config = {name: Returns.Config(what=name, on_failure=FailurePolicy(retries=0)) for name in NAMES}
        self.workers = {
            name: MicroBatcher(lambda name=name: RewardWorker({name: config[name]}), batch=8) for name in NAMES
        }

    async def score(self, reward, images, prompts):
        return await self.workers[reward].score(images, prompts)

    async def unready(self):
        return []


async def main() -> None:
    limits, token = Limits.model_validate_json(sys.argv[1]), hashlib.sha256(sys.argv[2].encode()).digest()
    app = create_app(Backend(), [{"name": name} for name in NAMES], limits=limits, token=token)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving


if __name__ == "__main__":
    asyncio.run(main())
