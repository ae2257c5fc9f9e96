"""The one place where plain worker classes become Ray actors."""

import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray

from align_cluster.cluster.sealing import for_workers, take
from align_cluster.config.plan import Plan, RewardPool
from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import StepWork, TrainingChunk
from align_cluster.learner.settings import LearnerSetup
from align_cluster.learner.state import Snapshot
from align_cluster.learner.worker import Learner
from align_cluster.rewards.worker import RewardWorker
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.types import Chunk, Condition, Perturbation, Record


def make_sampler(config: RunConfig, plan: Plan, place: Any, name: str) -> Any:
    """Start a sampler at `place`, or for None wherever the cluster has room."""
    device = "cuda" if plan.sampler_gpus else "cpu"
    shares = {"num_cpus": plan.sampler_cpus, "num_gpus": plan.sampler_gpus}
    actor = ray.remote(RemoteSampler).options(**shares, scheduling_strategy=place or "DEFAULT")
    arguments = (config.backbone, plan.threads, name, device, config.rollout.merge_lora)
    return actor.remote(*arguments, sealed=for_workers(config))


def make_reward_worker(config: RunConfig, plan: Plan, pool: RewardPool, place: Any) -> Any:
    """Start a reward worker at `place`, or for None wherever the cluster has room."""
    options = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "scheduling_strategy": place or "DEFAULT"}
    if pool.pip:
        options["runtime_env"] = {"pip": list(pool.pip)}
    rewards = {name: config.rewards[name] for name in pool.rewards}
    device = "cuda" if pool.gpus else "cpu"
    actor = ray.remote(RemoteRewardWorker).options(**options)
    return actor.remote(rewards, plan.threads, device, pool.batch, config.name, sealed=for_workers(config))


def make_learner_rank(plan: Plan, place: Any) -> Any:
    """Start the process of one learner rank at `place`; `LearnerRank.build` then makes its learner."""
    shares = {"num_cpus": plan.learner_cpus, "num_gpus": plan.learner_gpus}
    return ray.remote(LearnerRank).options(**shares, scheduling_strategy=place).remote(for_workers(plan.config))


class RemoteSampler(Sampler):
    """A sampler behind Ray, which resolves references only where they are arguments of their own."""

    def __init__(self, *arguments: Any, sealed: str = "") -> None:
        """Make a sampler in an environment with the sealed variables."""
        take(sealed)
        super().__init__(*arguments)

    def draw_chunk(self, chunk: Chunk, null: Condition | None, request: DrawRequest, *encodings: Any) -> Any:
        """Draw a chunk; conditions of its texts and then perturbations of its perturbed texts come in their order."""
        texts = chunk.texts
        conditions = dict(zip(texts, encodings[: len(texts)], strict=True))
        perturbations = dict(zip(chunk.perturbed_texts, encodings[len(texts) :], strict=True))
        return self.draw(chunk, conditions, null, request, perturbations)


class RemoteRewardWorker(RewardWorker):
    """A reward worker behind Ray."""

    def __init__(self, *arguments: Any, sealed: str = "") -> None:
        """Load the rewards in an environment with the sealed variables."""
        take(sealed)
        super().__init__(*arguments)


class LearnerRank:
    """Wraps one rank's Learner. It is built in two calls, because the other ranks need rank 0's address first.

    Ray resolves references only where they are arguments of their own, so a chunk arrives as its record and then the
    conditions of its texts, then perturbations where updates see them. They are paired here and nowhere else.
    """

    def __init__(self, sealed: str = "") -> None:
        """Put the sealed variables into the environment, for the model that `build` loads."""
        take(sealed)

    def address(self) -> tuple[str, int]:
        """Return this node's address and a free port, for the ranks to meet at."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def build(self, setup: LearnerSetup, rank: int, world: int, address: str, port: int, *options: Any) -> None:
        """Load the model and join the other ranks; `options` are threads and device."""
        self.learner = Learner(setup, rank, world, address, port, *options)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a state."""
        self.learner.restore(snapshot)

    def update(self, work: StepWork, null: Condition | None, *data: Any) -> tuple[Any, Snapshot | None]:
        """Train on a step's work, whose chunks and null condition come beside it, and after the chunks the conditions
        of replayed texts; return metrics and the state."""
        texts = work.replay_texts
        end = len(data) - len(texts)
        replayed = dict(zip(texts, data[end:], strict=True))
        whole = replace(work, null=null, chunks=self._paired(data[:end]), replay_conditions=replayed)
        metrics = self.learner.update(whole)
        return metrics, self.learner.state()

    def publish(self, source: str, version: int) -> Any:
        """Return the manifest and the buffer of an adapter."""
        return self.learner.publish(source, version)

    def values(self, *data: Any) -> Any:
        """Return the critic's values of each chunk, and the noise levels."""
        return self.learner.values(self._paired(data))

    def _paired(self, data: Sequence[Record | Condition | Perturbation]) -> list[TrainingChunk]:
        chunks, left = [], iter(data)
        for record in left:
            conditions = {text: next(left) for text in record.chunk.texts}
            explored = record.chunk.perturbed_texts if self.learner.setup.exploration else ()
            chunks.append(TrainingChunk(record, conditions, {text: next(left) for text in explored}))
        return chunks
