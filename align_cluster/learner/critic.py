"""Trains a critic beside the actor: an optimiser of its own, the same on every rank."""

import numpy as np
import torch

from align_cluster.algorithms.base import Batch
from align_cluster.algorithms.ppo import PPO
from align_cluster.backbones.critic import Critic
from align_cluster.config.run import OptimizerConfig
from align_cluster.learner.engine import MOMENTS, agree
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
        """One optimiser update an epoch, over all states of all samples. `scale` is the number of ranks over the
        samples' total weight. Where a loss or the gradient is not finite on any rank the weights stay as they are."""
        for _ in range(self.algorithm.config.critic_epochs):
            sound = True
            for batch, text, weights in batches:
                levels = torch.tensor(batch.sigmas, dtype=torch.float32, device=weights.device)
                slots = batch.indices.shape[1]
                for slot in range(slots):
                    values = self.critic(
                        batch.before[:, slot], levels[batch.indices[:, slot]], text.sequence, text.pooled
                    )
                    loss = self.algorithm.value_loss(values, batch, slot)
                    total = (loss * weights).sum() * scale / slots
                    sound = sound and bool(torch.isfinite(total))
                    total.backward()
                    add(sums, "value_loss", float((loss.detach() * weights).sum()), float(weights.sum()))
            norm = self._step(sound)
            add(sums, "critic_skipped", float(norm is None), 1.0)
            if norm is not None:
                add(sums, "critic_grad_norm", norm, 1.0)

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
        """Steps of its AdamW, and weights by name with the moments under "<moment>/<name>"."""
        found, steps = self.critic.state(), 0
        for name, state in self._moments().items():
            found |= {f"{key}/{name}": state[key] for key in MOMENTS}
            steps = int(state["step"])
        return steps, found

    def restore(self, steps: int, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave."""
        own = self._moments()
        for name, moments in own.items():
            moments["step"].fill_(steps)
            for key in MOMENTS:
                moments[key].copy_(state[f"{key}/{name}"])
        self.critic.restore({name: value for name, value in state.items() if not name.startswith(MOMENTS)})

    def _moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """AdamW's state of each trained weight by its name in the critic's; made here where no step has made it."""
        named = {f"head.{name}": value for name, value in self.critic.head.named_parameters()}
        named |= {f"adapter.{name}": value for name, value in self.critic.adapter.items()}
        for parameter in named.values():
            if not self.optimizer.state[parameter]:
                zeros = {key: torch.zeros_like(parameter) for key in MOMENTS}
                self.optimizer.state[parameter].update(step=torch.zeros((), dtype=torch.float32), **zeros)
        return {name: self.optimizer.state[parameter] for name, parameter in named.items()}
