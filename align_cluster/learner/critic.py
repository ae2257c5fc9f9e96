"""The critic's training beside the actor. Its optimiser is its own and does the same on every rank.

It learns from replayed states, or from those of the step alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch

from align_cluster.algorithms.base import Batch
from align_cluster.algorithms.ppo import PPO
from align_cluster.backbones.critic import Critic
from align_cluster.learner.batching import MetricSums
from align_cluster.learner.engine import MOMENTS, agree
from align_cluster.learner.settings import OptimizerConfig
from align_cluster.rollouts.guidance import TextBatch
from align_cluster.streams import hashed, stream
from align_cluster.types import Condition, Record, ReplayBatch

State = tuple[int, int, int]  # number of the micro-batch, row in it, step


@dataclass(frozen=True)
class CriticBatch:
    """Holds one micro-batch of the critic on the CPU: the samples, their conditions, and their weights [b]."""

    samples: Batch
    text: TextBatch
    weights: torch.Tensor

    def length(self, row: int) -> int:
        """Return the number of tokens of a row's text."""
        return self.text.sequence.shape[1] if self.text.mask is None else int(self.text.mask[row].sum())


class CriticLearner:
    """Trains what the critic trains with AdamW. It is small, whole on every rank, with averaged gradients."""

    def __init__(self, critic: Critic, algorithm: PPO, optimizer: OptimizerConfig, world: int) -> None:
        self.critic, self.algorithm, self.world, self.max_norm = critic, algorithm, world, optimizer.max_grad_norm
        self.batch = algorithm.config.critic_batch
        self.optimizer = torch.optim.AdamW(
            critic.trainable, algorithm.config.critic_lr, optimizer.betas, optimizer.eps, optimizer.weight_decay
        )

    @torch.no_grad()
    def values(self, record: Record, text: TextBatch) -> np.ndarray:
        """Return values fp32 [B, N, R] of the states that a record's steps started from, under its rows' conditions."""
        device, shape = text.sequence.device, record.indices.shape
        owners = torch.arange(shape[0], device=device).repeat_interleave(shape[1])
        levels = torch.tensor(record.sigmas[record.indices.ravel()], dtype=torch.float32, device=device)
        states = torch.tensor(record.before, device=device).flatten(0, 1)
        found = [
            self.critic(x, sigma, own.sequence, own.pooled, own.mask)
            for x, sigma, rows in zip(*(column.split(self.batch) for column in (states, levels, owners)), strict=True)
            for own in (text[rows],)
        ]
        return torch.cat(found).unflatten(0, shape).cpu().numpy()

    def update(
        self,
        batches: list[CriticBatch],
        scale: float,
        metrics: MetricSums,
        pretraining: bool = False,
    ) -> None:
        """Make one optimiser update an epoch from states of all samples that are not masked.

        `scale` is the number of ranks over the total weight. In `pretraining` values are not clipped. Where a loss or
        the gradient is not finite on any rank, the weights stay as they are.
        """
        for epoch in range(self.algorithm.config.critic_epochs):
            slots = [self._slots(batch.samples, epoch) for batch in batches]
            parts = (_gathered(part, batches) for part in self._passes(slots, batches))
            self._learn(parts, scale / len(slots[0][0]), metrics, pretraining)

    def replay(self, batches: Sequence[ReplayBatch], texts: Mapping[str, Condition], metrics: MetricSums) -> None:
        """Make one optimiser update from each batch of replayed states. Their values regress on what was paid, and are
        not clipped: the values that they had once say nothing now."""
        for batch in batches:
            parts = (_replayed(rows, batch, texts) for rows in self._alike(batch, texts))
            self._learn(parts, self.world / batch.total, metrics, pretraining=True)

    def _learn(
        self, parts: Iterable[tuple[torch.Tensor, ...]], share: float, metrics: MetricSums, pretraining: bool
    ) -> None:
        """Make one optimiser update from the columns of several forward passes, as `_gathered` returns them."""
        sound, device = True, self.critic.backbone.device
        for columns in parts:
            x, sigma, sequence, pooled, before, returns, weights = (column.to(device) for column in columns)
            values = self.critic(x, sigma, sequence, pooled)
            loss = self.algorithm.value_loss(values, before, returns, pretraining)
            total = (loss * weights).sum() * share
            sound = sound and bool(torch.isfinite(total))
            with self.critic.active():
                total.backward()
            metrics.add("value_loss", float((loss.detach() * weights).sum()), float(weights.sum()))
        norm = self._step(sound)
        metrics.add("critic_skipped", float(norm is None))
        if norm is not None:
            metrics.add("critic_grad_norm", norm)

    def kept(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Return what replay keeps of a record: states fp16 [B, K, C, H, W] and the steps [B, K] that they stand
        before. Each sample's own random stream chooses them."""
        wanted, count = self.algorithm.config.replay.states, record.indices.shape[1]
        slots = np.tile(np.arange(count), (len(record.chunk), 1))
        if wanted < count:
            streams = [stream(hashed(f"{seed} {record.chunk.step} replayed states")) for seed in record.chunk.seeds]
            slots = np.stack([torch.randperm(count, generator=own)[:wanted].sort()[0].numpy() for own in streams])
        rows = np.arange(len(slots))[:, None]
        return record.before[rows, slots].astype(np.float16), record.indices[rows, slots]

    def _alike(self, batch: ReplayBatch, texts: Mapping[str, Condition]) -> Iterator[list[int]]:
        """Yield the rows of each forward pass: `batch` of them, under texts of one length."""

        def length(row: int) -> int:
            return len(texts[batch.texts[row]].sequence)

        for _, alike in groupby(sorted(range(len(batch.texts)), key=length), length):
            alike = list(alike)
            yield from (alike[start : start + self.batch] for start in range(0, len(alike), self.batch))

    def _slots(self, batch: Batch, epoch: int) -> list[list[int]]:
        """Return the states of each sample to train on. The sample's own random stream chooses them, so ranks and
        micro-batches make no difference."""
        samples, count = batch.recorded.indices.shape
        wanted = self.algorithm.config.critic_states
        if wanted is None or wanted >= count:
            return [list(range(count))] * samples
        streams = batch.generators(f"critic states {epoch}")
        return [sorted(torch.randperm(count, generator=stream)[:wanted].tolist()) for stream in streams]

    def _passes(self, slots: list[list[list[int]]], batches: list[CriticBatch]) -> Iterator[list[State]]:
        """Yield the states of each forward pass: `batch` of them, under texts of one length. Masked samples have
        none."""

        def length(state: State) -> int:
            return batches[state[0]].length(state[1])

        states = [
            (number, row, slot)
            for number, (rows, batch) in enumerate(zip(slots, batches, strict=True))
            for row, (own, weight) in enumerate(zip(rows, batch.weights.tolist(), strict=True))
            for slot in (own if weight else ())
        ]
        for _, alike in groupby(sorted(states, key=length), length):
            alike = list(alike)
            yield from (alike[start : start + self.batch] for start in range(0, len(alike), self.batch))

    def _step(self, sound: bool) -> float | None:
        parameters = self.critic.trainable
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.world > 1:
                torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= self.world
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        fine = agree(sound, norm.device) and bool(torch.isfinite(norm))
        if fine:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm) if fine else None

    def state(self) -> tuple[int, dict[str, torch.Tensor]]:
        """Return the steps of its AdamW, and weights by name with the moments under "<moment>/<name>"."""
        found, steps = self.critic.state(), 0
        for name, state in self._moments().items():
            found |= {f"{key}/{name}": state[key] for key in MOMENTS}
            steps = int(state["step"])
        return steps, found

    def restore(self, steps: int, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` returned."""
        own = self._moments()
        for name, moments in own.items():
            moments["step"].fill_(steps)
            for key in MOMENTS:
                moments[key].copy_(state[f"{key}/{name}"])
        self.critic.restore({name: value for name, value in state.items() if not name.startswith(MOMENTS)})

    def _moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return AdamW's state of each trained weight by name. It makes the state where no step has made it yet."""
        named = self.critic.named
        for parameter in named.values():
            if not self.optimizer.state[parameter]:
                zeros = {key: torch.zeros_like(parameter) for key in MOMENTS}
                self.optimizer.state[parameter].update(step=torch.zeros((), dtype=torch.float32), **zeros)
        return {name: self.optimizer.state[parameter] for name, parameter in named.items()}


def _replayed(rows: list[int], batch: ReplayBatch, texts: Mapping[str, Condition]) -> tuple[torch.Tensor, ...]:
    """Return the columns of `_gathered` for rows of a replayed batch."""
    text = TextBatch.build([texts[batch.texts[row]] for row in rows], None, torch.device("cpu"))
    states, targets = torch.from_numpy(batch.states[rows]).float(), torch.from_numpy(batch.targets[rows])
    before = torch.zeros_like(targets)  # not clipped, so not read
    return (
        states,
        torch.from_numpy(batch.levels[rows]),
        text.sequence,
        text.pooled,
        before,
        targets,
        torch.ones(len(rows)),
    )


def _gathered(states: list[State], batches: list[CriticBatch]) -> tuple[torch.Tensor, ...]:
    """Return x, sigma, sequence, pooled, values before, returns and weights of states, each [len(states), ...]; their
    texts have one length, without padding."""

    def parts() -> Iterator[tuple[torch.Tensor, ...]]:
        for number, own in groupby(states, itemgetter(0)):
            batch, (_, row, slot) = batches[number], torch.tensor(list(own)).T
            recorded, critic, text = batch.samples.recorded, batch.samples.critic, batch.text[row]
            levels = torch.tensor(batch.samples.sigmas, dtype=torch.float32)[recorded.indices[row, slot]]
            sequence = text.sequence[:, : batch.length(int(row[0]))]
            targets = critic.values[row, slot], critic.returns[row, slot], batch.weights[row]
            yield recorded.before[row, slot], levels, sequence, text.pooled, *targets

    return tuple(torch.cat(column) for column in zip(*parts(), strict=True))
