"""A policy on 2-D points, small enough that a whole alignment takes a second."""

import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from align_cluster.algorithms.base import Batch, Policy
from align_cluster.rollouts.denoise import denoise
from align_cluster.rollouts.schedule import sd3_sigmas
from align_cluster.rollouts.steps import STEPS

SHAPE = (2, 1, 1)


def gaussian_velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Velocity of the flow whose data law is a standard normal."""
    t = sigma.view(-1, 1, 1, 1)
    return x * (2 * t - 1) / ((1 - t) ** 2 + t**2)


class Residual(torch.nn.Module):
    """What an adapter adds to the base velocity: nothing at first, as with a LoRA whose B is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(3, 32)
        self.out = torch.nn.Linear(32, 2)
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        features = torch.cat([x.flatten(1), sigma[:, None]], 1)
        return self.out(torch.tanh(self.hidden(features))).view_as(x)


class ToyPolicy(Policy):
    """A base velocity with one residual network an adapter, for rollouts of `steps` steps of one kind."""

    def __init__(
        self,
        kind: str = "flow_sde",
        steps: int = 6,
        base: Callable = gaussian_velocity,
        sigmas: np.ndarray | None = None,
        prediction: str = "flow",
    ) -> None:
        self.base, self.kind, self.prediction = base, kind, prediction
        self.sigmas = sd3_sigmas(steps, 1.0) if sigmas is None else sigmas
        torch.manual_seed(0)
        self.adapters = {"default": Residual(), "old": Residual().requires_grad_(False)}
        self.adapters["old"].load_state_dict(self.adapters["default"].state_dict())
        self.step = STEPS[kind](STEPS[kind].Config(), self.sigmas, prediction)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.adapters["default"].parameters())

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, adapter: str | None = "default") -> torch.Tensor:
        with torch.set_grad_enabled(adapter == "default"):
            v = self.base(x, sigma)
            return v if adapter is None else v + self.adapters[adapter](x, sigma)

    def rollout(self, seeds: range, indices: tuple[int, ...] = (), adapter: str = "default") -> SimpleNamespace:
        """What a sampler records for one sample a seed."""
        step = STEPS[self.kind](STEPS[self.kind].Config(), self.sigmas, self.prediction)
        own = np.tile(np.array(indices, dtype=np.int64), (len(seeds), 1))
        path = denoise(lambda x, t: self.velocity(x, t, adapter), step, SHAPE, seeds, indices=own)
        return SimpleNamespace(path=path, seeds=seeds, indices=torch.from_numpy(own))

    def batch(self, rollout: SimpleNamespace, advantages: torch.Tensor, turn: int = 0, moment: int = 0) -> Batch:
        """The learner's micro-batch of a whole rollout."""

        def generators(purpose: str) -> list[torch.Generator]:
            names = (f"{seed} {moment} {purpose}" for seed in rollout.seeds)
            return [torch.Generator().manual_seed(random.Random(name).getrandbits(62)) for name in names]

        path = rollout.path
        return Batch(
            turn,
            advantages,
            path.x0,
            self.sigmas,
            rollout.indices,
            path.before,
            path.after,
            path.log_probs,
            path.means,
            generators,
        )


@pytest.fixture
def make_policy() -> type[ToyPolicy]:
    return ToyPolicy
