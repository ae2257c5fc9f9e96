"""Trains a critic beside the actor: an optimiser of its own, the same on every rank."""

import numpy as np
import torch

from align_cluster.algorithms.base import Batch
from align_cluster.algorithms.ppo import PPO
from align_cluster.backbones.critic import Critic
from align_cluster.config.run import OptimizerConfig
from align_cluster.learner.sums import add
from align_cluster.rollouts.guidance import TextBatch
from align_cluster.types import Record


class CriticLearner:
    """AdamW on the critic's head and adapter, which are small and whole on every rank; gradients are averaged."""

    def __init__(self, critic: Critic, algorithm: PPO, optimizer: OptimizerConfig, world: int) -> None:
        self.critic, self.algorithm, self.world, self.max_norm = critic, algorithm, world, optimizer.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            critic.trainable, algorithm.config.critic_lr, optimizer.betas, optimizer.eps, optimizer.weight_decay
        )

    @torch.no_grad()
    def values(self, record: Record, text: TextBatch) -> np.ndarray:
        """Values fp32 [B, N, R] of the states that a record's steps started from."""
        device = text.sequence.device
        levels = torch.tensor(record.sigmas, dtype=torch.float32, device=device)
        columns = []
        for slot in range(record.indices.shape[1]):
            x = torch.tensor(record.before[:, slot], device=device)
            sigma = levels[torch.tensor(record.indices[:, slot], device=device)]
            columns.append(self.critic(x, sigma, text.sequence, text.pooled).cpu().numpy())
        return np.stack(columns, 1)

    def update(
        self, batches: list[tuple[Batch, TextBatch, torch.Tensor]], scale: float, sums: dict[str, list[float]]
    ) -> None:
        """One optimiser update an epoch, over the states of all samples that are to be trained on. `scale` is the
        number of ranks over the samples' total weight; raises FloatingPointError before a loss that is not finite
        changes any weight."""
        for epoch in range(self.algorithm.config.critic_epochs):
            for batch, text, weights in batches:
                levels = torch.tensor(batch.sigmas, dtype=torch.float32, device=weights.device)
                slots = self._slots(batch, epoch)
                for slot in slots:
                    values = self.critic(
                        batch.before[:, slot], levels[batch.indices[:, slot]], text.sequence, text.pooled
                    )
                    loss = self.algorithm.value_loss(values, batch, slot)
                    total = (loss * weights).sum() * scale / len(slots)
                    if not torch.isfinite(total):
                        raise FloatingPointError("the critic's loss is not finite: lower algorithm.critic_lr")
                    with self.critic.active():
                        total.backward()
                    add(sums, "value_loss", float((loss.detach() * weights).sum()), float(weights.sum()))
            add(sums, "critic_grad_norm", self._step(), 1.0)

    def _slots(self, batch: Batch, epoch: int) -> list[int]:
        """Which states of a micro-batch are trained on: as its first sample's stream of the moment says, so that ranks
        make no difference."""
        count, wanted = batch.indices.shape[1], self.algorithm.config.critic_states
        if wanted is None or wanted >= count:
            return list(range(count))
        stream = batch.generators(f"critic states {epoch}")[0]
        return sorted(torch.randperm(count, generator=stream)[:wanted].tolist())

    def _step(self) -> float:
        parameters = self.critic.trainable
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.world > 1:
                torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= self.world
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)
