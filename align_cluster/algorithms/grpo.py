"""Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): clipped policy gradient over the steps of an SDE rollout."""

import random
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat

from align_cluster.algorithms.base import Algorithm, Batch, Policy
from align_cluster.algorithms.terms import clipped_surrogate, gaussian_kl
from align_cluster.config.base import Section


class GRPO(Algorithm):
    """Every trained denoising step of a sample gets the sample's group advantage."""

    class Config(Section):
        """`timestep_fraction` of the steps before the last are trained: the first ones, or a seeded random choice a
        step.

        `kl_mode` says what `kl_beta` multiplies; see `terms.gaussian_kl`. The published values use no_dt.
        """

        kind: Literal["grpo"] = "grpo"
        clip: PositiveFloat = 1e-4
        advantage_clip: PositiveFloat = 5.0
        timestep_fraction: Annotated[float, Field(gt=0, le=1)] = 0.99
        timestep_choice: Literal["first", "random"] = "first"
        kl_beta: Annotated[float, Field(ge=0)] = 0.04
        kl_mode: Literal["no_dt", "exact_mean", "exact_sum"] = "no_dt"

    needs_density = True
    default_step = "flow_sde"
    behaviour = "default"
    adapters = ("default",)

    def record_indices(self, steps: int, seed: int) -> tuple[int, ...]:
        usable = range(max(1, steps - 1))  # the terminal step has (almost) no noise, hence no usable density
        count = self.turns(steps)
        if self.config.timestep_choice == "first":
            return tuple(usable[:count])
        return tuple(sorted(random.Random(seed).sample(usable, count)))

    def turns(self, steps: int) -> int:
        return max(1, min(steps - 1, int(steps * self.config.timestep_fraction)))

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        k = int(batch.indices[batch.turn])
        x, x_next = batch.before[:, batch.turn], batch.after[:, batch.turn]
        sigma = torch.full((len(x),), float(batch.sigmas[k]), dtype=torch.float32, device=x.device)
        v = policy.velocity(x, sigma)
        log_prob = policy.log_prob(k, x, v, x_next)
        old = batch.log_probs[:, batch.turn]
        advantage = batch.advantages.clamp(-self.config.advantage_clip, self.config.advantage_clip)
        loss, ratio = clipped_surrogate(log_prob, old, advantage, self.config.clip)
        metrics = {
            "log_ratio": (log_prob - old).detach(),
            "clip_high": (ratio.detach() > 1 + self.config.clip).float(),
            "clip_low": (ratio.detach() < 1 - self.config.clip).float(),
        }
        if self.config.kl_beta:
            mean, std, std_t = policy.step_mean(k, x, v)
            reference, _, _ = policy.step_mean(k, x, policy.velocity(x, sigma, None))
            kl = gaussian_kl(mean, reference, std, std_t, self.config.kl_mode)
            loss, metrics["kl"] = loss + self.config.kl_beta * kl, kl.detach()
        return loss, metrics
