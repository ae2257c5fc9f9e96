"""ReFL (Xu et al. 2023, arXiv 2304.05977, algorithm 1): the gradient of a reward through one late denoising step."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, field_validator

from align_cluster.algorithms.base import REWARD, SATISFIED, Algorithm, Batch, Policy
from align_cluster.algorithms.reward_gradient import margin_problems
from align_cluster.backbones.noising import clean
from align_cluster.rollouts.windows import Window
from align_cluster.settings import Root, Section


class ReFL(Algorithm):
    """ReFL: samplers record the start of a random late step of each sample; the learner predicts x0 from there.

    Nothing is repeated but that one prediction, so steps may draw noise on the way, as the official script's do.
    """

    class Config(Section):
        """Configures ReFL."""

        kind: Literal["refl"] = "refl"
        steps: tuple[NonNegativeInt, NonNegativeInt] = (30, 39)
        """The first and the last denoising step of the rollout that a sample's step is drawn from, counted from 0, the
        noisiest. The default is the official script's, for rollouts of 40 steps."""
        margin: float | None = 2.0
        """The reward from which on a sample has no gradient; null gives all samples one. 2 is the official script's and
        belongs to ImageReward's scale."""
        grad_scale: PositiveFloat = 1e-3
        """The factor of the loss. AdamW undoes it, except for optimizer.max_grad_norm and optimizer.eps. The official
        script uses 1e-3."""

        @field_validator("steps")
        @classmethod
        def in_order(cls, steps: tuple[int, int]) -> tuple[int, int]:
            """Refuse a first step above the last one."""
            if steps[0] > steps[1]:
                raise ValueError("[first, last], the first not above the last")
            return steps

        def problems(self, where: str, run: Root) -> Iterator[str]:
            """Refuse steps that a rollout does not have, and a margin that ordinary images reach."""
            steps = run.rollout.steps
            if self.steps[1] >= steps:
                yield (
                    f"{where}.steps is {list(self.steps)}, and a rollout of {steps} steps ends with step {steps - 1}; "
                    f"set it to [{steps * 3 // 4}, {steps - 1}], or rollout.steps to {self.steps[1] + 1}"
                )
            yield from margin_problems(self.margin, where, run)

    needs_density = False
    reward_gradient = True
    default_step = "euler"
    behaviour = "default"
    adapters = ("default",)
    metrics = (REWARD, SATISFIED)

    def states(self, steps: int) -> Window:
        """Each sample records one of the steps, chosen at random."""
        first, last = self.config.steps
        return Window(tuple(range(steps)), tuple(range(first, last + 1)), 1)

    def inner_passes(self, steps: int, recorded: int) -> int:
        """One pass is enough, because each sample has one state."""
        return 1

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss is minus the reward of the one-step prediction of x0, or the gap to `margin`."""
        x, k = batch.recorded.before[:, 0], batch.recorded.indices[:, 0]
        x0 = clean(x, policy.velocity(x, policy.step.fed(k)), policy.step.level(k), policy.step.prediction)
        reward = policy.rewards(x0, [[text] for text in batch.prompts])[:, 0]
        margin, metrics = self.config.margin, {"reward": reward.detach()}
        if margin is not None:
            metrics["satisfied"] = (metrics["reward"] >= margin).float()
        return self.config.grad_scale * (-reward if margin is None else torch.relu(margin - reward)), metrics
