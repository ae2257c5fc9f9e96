"""DRaFT-K and DRaFT-LV (Clark et al. 2023, arXiv 2309.17400): reward gradients through the last denoising steps."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt

from align_cluster.algorithms.base import REWARD, Algorithm, Batch, Policy
from align_cluster.backbones.noising import noised
from align_cluster.rollouts.denoise import initial_noise
from align_cluster.rollouts.windows import Window
from align_cluster.settings import Root, Section


class DRaFT(Algorithm):
    """DRaFT: samplers record the start of the last K steps; the learner repeats those steps with gradient.

    DRaFT-LV takes x0 alone and noises it again to the last step's level. Several such noises lower the gradient's
    variance.
    """

    class Config(Section):
        """Configures DRaFT."""

        kind: Literal["draft"] = "draft"
        last: PositiveInt = 1
        """The number K of last denoising steps that gradients go through. All steps of the rollout, with
        learner.gradient_checkpointing, are plain DRaFT; each step takes more memory."""
        renoised: NonNegativeInt = 0
        """The number of noised copies of the last step that the gradient is averaged over, which is DRaFT-LV; it needs
        `last` 1. 0 takes the step that the rollout recorded. The paper uses 2."""

        def problems(self, where: str, run: Root) -> Iterator[str]:
            """Refuse more steps than a rollout has, and several steps that are noised again."""
            steps = run.rollout.steps
            if self.last > steps:
                yield f"{where}.last is {self.last}, and a rollout has {steps} steps; set it to at most {steps}"
            if self.renoised and self.last > 1:
                yield (
                    f"{where}.renoised is {self.renoised}, which repeats the last step alone, and {where}.last is "
                    f"{self.last}; set one of them: last to 1, or renoised to 0"
                )

        def notes(self, where: str, run: Root) -> Iterator[str]:
            """Note a last step that begins at hardly any noise."""
            if self.last == 1 and run.tiny_last_level:
                yield (
                    f"{where}.last is 1, and the last step of SD3's schedule begins at noise .009: its gradient does "
                    "next to nothing; rollout.schedule.kind linear has a last step that counts"
                )

    needs_density = False
    reward_gradient = True
    repeats_steps = True
    default_step = "euler"
    behaviour = "default"
    adapters = ("default",)
    metrics = (REWARD,)

    def states(self, steps: int) -> Window | None:
        """DRaFT-K records the start of the last K steps; DRaFT-LV records nothing."""
        return None if self.config.renoised else Window((), (steps - self.config.last,), 1)

    def inner_passes(self, steps: int, recorded: int) -> int:
        """DRaFT-LV takes one pass for each noised copy, DRaFT-K one in all."""
        return self.config.renoised or 1

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss is minus the reward of the image that the last steps draw."""
        steps = len(batch.sigmas) - 1

        def at(k: int) -> torch.Tensor:
            return torch.full((len(batch.x0),), k, device=batch.x0.device)

        if self.config.renoised:
            noise = initial_noise(batch.generators("noise"), batch.x0.shape[1:]).to(batch.x0)
            x = noised(batch.x0, noise, policy.step.level(at(steps - 1)), policy.step.prediction)
        else:
            x = batch.recorded.before[:, 0]
        for k in range(steps - self.config.last, steps):
            x = policy.step.advance(k, x, policy.velocity(x, policy.step.fed(at(k))))
        reward = policy.rewards(x, [[text] for text in batch.prompts])[:, 0]
        return -reward, {"reward": reward.detach()}
