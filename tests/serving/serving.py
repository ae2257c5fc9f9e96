"""A reward service without Ray, in a process of its own: `serving.py LIMITS_AS_JSON TOKEN` prints its port.

One reward is right; the others return what no reward may.
"""

import hashlib
import sys
import threading
from typing import Literal

import numpy as np

from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import FailurePolicy, Result, Reward, RewardSection
from align_cluster.rewards.worker import RewardWorker
from align_cluster.serving.api import create_app
from align_cluster.serving.batching import MicroBatcher
from align_cluster.serving.config import Limits
from align_cluster.serving.listening import bound, listening


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


def main() -> None:
    limits, token = Limits.model_validate_json(sys.argv[1]), hashlib.sha256(sys.argv[2].encode()).digest()
    app = create_app(Backend(), [{"name": name} for name in NAMES], limits=limits, token=token)
    listener = bound("127.0.0.1", 0)
    with listening(app, listener, limits):
        print(listener.getsockname()[1], flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
