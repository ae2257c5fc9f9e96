"""A policy on 2-D points, small enough that a whole alignment takes a second."""

import random
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from align_cluster.algorithms.base import Batch, Policy, RecordedSteps
from align_cluster.backbones.levels import ddim_levels, linear_sigmas
from align_cluster.rollouts.denoise import denoise
from align_cluster.rollouts.steps import STEPS, Step

SHAPE = (2, 1, 1)
MEAN, WIDTH = 0.3, 0.8
GOALS = {"goal": (1.5, -1.0), "more goal": (2.5, -2.0), "less goal": (-2.5, 2.0)}


def gaussian_network(prediction: str) -> Callable:
    """What a perfect network of the data law N(MEAN, WIDTH^2) outputs for x at a noise level.

    With x = a x0 + s eps, d = (x - a MEAN) / (a^2 WIDTH^2 + s^2) gives E[eps | x] = s d and
    E[x0 | x] = MEAN + a WIDTH^2 d.
    """

    def network(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        s = level.view(-1, 1, 1, 1)
        a = 1 - s if prediction == "flow" else torch.sqrt(1 - s**2)
        d = (x - a * MEAN) / (a**2 * WIDTH**2 + s**2)
        eps, x0 = s * d, MEAN + a * WIDTH**2 * d
        return {"flow": eps - x0, "epsilon": eps, "v": a * eps - s * x0}[prediction]

    return network


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
    """A base network with one residual network an adapter, for rollouts of `steps` steps of one kind.

    The base is that of a Gaussian data law unless given; `settings` are the step kind's.
    """

    law = (MEAN, WIDTH)

    def __init__(
        self,
        kind: str = "flow_sde",
        steps: int = 6,
        base: Callable | None = None,
        prediction: str = "flow",
        shift: float = 1.0,
        **settings: float | bool,
    ) -> None:
        self.base, self.kind, self.prediction = base or gaussian_network(prediction), kind, prediction
        self.config = STEPS[kind].Config(**settings)
        # Not SD3's levels: the last but one is so small there that flow_ddim hardly has noise in a trained step.
        self.sigmas = linear_sigmas(steps, shift) if prediction == "flow" else ddim_levels(steps)
        torch.manual_seed(0)
        self.adapters = {"default": Residual(), "old": Residual().requires_grad_(False)}
        self.adapters["old"].load_state_dict(self.adapters["default"].state_dict())
        self.step = self.new_step()

    def new_step(self) -> Step:
        return STEPS[self.kind](self.config, self.sigmas, self.prediction)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.adapters["default"].parameters())

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, adapter: str | None = "default") -> torch.Tensor:
        with torch.set_grad_enabled(adapter == "default"):
            v = self.base(x, sigma)
            return v if adapter is None else v + self.adapters[adapter](x, sigma)

    def rewards(self, latents: torch.Tensor, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Minus the squared distances of each latent to points of its own texts."""
        goals = torch.tensor([[GOALS[text] for text in own] for own in texts])
        return -((latents.flatten(1)[:, None] - goals) ** 2).sum(2)

    def rollout(
        self,
        seeds: range,
        indices: Sequence[int] | np.ndarray = (),
        adapter: str | None = "default",
        noisy: Collection[int] | None = None,
    ) -> SimpleNamespace:
        """What a sampler records for one sample a seed: the steps `indices`, of all samples or [B, K] of each."""
        own = np.array(indices, dtype=np.int64)
        if own.ndim == 1:
            own = np.tile(own, (len(seeds), 1))
        path = denoise(
            lambda x, t: self.velocity(x, t, adapter),
            self.new_step(),
            SHAPE,
            seeds,
            noisy=noisy,
            indices=own,
            means=True,
        )
        return SimpleNamespace(path=path, seeds=seeds, indices=torch.from_numpy(own))

    def batch(
        self,
        rollout: SimpleNamespace,
        advantages: torch.Tensor,
        passes: int | Sequence[int] = 0,
        moment: int = 0,
        prompts: Sequence[str] = (),
    ) -> Batch:
        """The learner's micro-batch of a whole rollout, in one inner pass or in several that are folded into one."""
        numbers = [passes] if isinstance(passes, int) else list(passes)
        visits = [(seed, number) for number in numbers for seed in rollout.seeds]

        def generators(purpose: str, *, shared: bool = False) -> list[torch.Generator]:
            names = (f"{seed} {moment} {purpose} {'all' if shared else number}" for seed, number in visits)
            return [torch.Generator().manual_seed(random.Random(name).getrandbits(62)) for name in names]

        def folded(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else torch.cat([tensor] * len(numbers))

        path = rollout.path
        return Batch(
            passes=tuple(number for _, number in visits),
            advantages=folded(advantages),
            x0=folded(path.x0),
            sigmas=self.sigmas,
            recorded=RecordedSteps(
                indices=folded(rollout.indices),
                before=folded(path.before),
                after=folded(path.after),
                log_probs=folded(path.log_probs),
                means=folded(path.means),
            ),
            generators=generators,
            prompts=tuple(prompts or ["goal"] * len(rollout.seeds)) * len(numbers),
            noises=tuple(rollout.seeds) * len(numbers),
            update=moment,
        )


@pytest.fixture
def make_policy() -> type[ToyPolicy]:
    return ToyPolicy
