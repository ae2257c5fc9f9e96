"""Workers that sleep where real ones compute. All else of a run is real: the driver, the pools, Ray's object store, and
the sizes of what goes through it, which are those of Stable Diffusion 3.5 Medium at 512 px (images, final latents,
conditions, a LoRA of rank 32).
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import ray

from align_cluster.cluster import learners
from align_cluster.learner.batching import RankMetric, StepWork
from align_cluster.learner.state import Snapshot
from align_cluster.loop import workers
from align_cluster.rollouts.sampler import DrawRequest, fingerprint, keys_of
from align_cluster.types import Chunk, Condition, DrawInfo, Manifest, Prompt, Receipt, Record, Scores
from align_cluster.weights import checksum, publish

LORA = 18_800_000  # parameters, fp32
OF_STANDINS = (  # settings of a run whose workers sleep: nothing but steps, with one learner and one reward
    "learner.updates_per_step=1",
    "rewards={jpeg: {kind: jpeg}}",
    "checkpoint.every=0",
    "cluster.learners=1",
    "evaluate.every=0",
    "evaluate.grid_every=0",
    "evaluate.count=2",
    "evaluate.images_per_prompt=1",
    "evaluate.grid_prompts=1",
    "evaluate.grid_columns=1",
)


class SleepingSampler:
    """Draws black images in a given time for each."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds

    def encode(self, texts: list[str]) -> list[Condition]:
        keys = [hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in texts]
        return [Condition(key, np.zeros((333, 4096), np.float16), np.zeros(2048, np.float16)) for key in keys]

    def adopt(self, manifest: Manifest, buffer: np.ndarray) -> Receipt:
        return Receipt(self.name, manifest.version, len(manifest.tensors), checksum(buffer), 0.0)

    def draw_chunk(self, chunk: Chunk, null: Any, request: DrawRequest, *encodings: Condition) -> tuple:
        time.sleep(self.seconds * len(chunk))
        asked = fingerprint(chunk, request, keys_of(dict(zip(chunk.texts, encodings, strict=True))), {})
        x0, indices = np.zeros((len(chunk), 16, 64, 64), np.float32), np.empty((len(chunk), 0), np.int64)
        record = Record(chunk, request.version, x0, np.linspace(1, 0, request.steps + 1), indices)
        return DrawInfo(chunk, request.version, asked, 0.0), np.zeros((len(chunk), 512, 512, 3), np.uint8), record

    def lora_file(self, manifest: Manifest, buffer: np.ndarray) -> tuple[str, bytes]:
        return "pytorch_lora_weights.safetensors", buffer[:1024].tobytes()


class SleepingReward:
    """Scores images in a given time for each."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def score_chunks(self, prompts: list[list[Prompt]], starts: list[int], *images: np.ndarray) -> list[Scores]:
        time.sleep(self.seconds * sum(map(len, prompts)))
        sizes = [len(own) for own in prompts]
        return [Scores({"jpeg": np.arange(n) / n}, {"jpeg": np.ones(n, bool)}, {}, {}, {"jpeg": 0.1}) for n in sizes]


class SleepingRank:
    """Trains on a step in a given time."""

    def __init__(self, seconds: float, parameters: int) -> None:
        self.seconds, self.updates, self.lora = seconds, 0, {"lora": np.zeros(parameters, np.float32)}

    def address(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def build(self, *arguments: Any) -> None:
        pass

    def update(self, work: StepWork, null: Any, *data: Any) -> tuple[dict[str, RankMetric], Snapshot]:
        time.sleep(self.seconds)
        self.updates += 1
        self.lora["lora"][:100] += 1.0
        state = Snapshot.of({"updates": self.updates, "steps": self.updates}, {"adapter/default/a": np.zeros(1)})
        return {"loss": RankMetric(0.0, 1.0, 0.0), "seconds": RankMetric(self.seconds, 1.0, self.seconds)}, state

    def publish(self, source: str, version: int) -> tuple[Manifest, np.ndarray]:
        return publish(self.lora, version)


@contextmanager
def standins(draw_s: float, train_s: float, score_s: float, parameters: int = LORA) -> Iterator[None]:
    """Let a run's workers sleep: for so many seconds for an image's drawing and scoring, and for a step's training.

    The LoRA that they sync has `parameters`.
    """

    def actor(kind: type, *arguments: Any) -> Any:
        return ray.remote(kind).options(num_cpus=0).remote(*arguments)

    def sampler(config: Any, plan: Any, place: Any, name: str) -> Any:
        return actor(SleepingSampler, name, draw_s)

    with (
        mock.patch.object(workers, "make_sampler", sampler),
        mock.patch.object(workers, "make_reward_worker", lambda *_: actor(SleepingReward, score_s)),
        mock.patch.object(learners, "make_learner_rank", lambda *_: actor(SleepingRank, train_s, parameters)),
    ):
        yield
