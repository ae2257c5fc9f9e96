"""Hands the learner's network to an algorithm as a policy, and the gradient of the trained rewards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from align_cluster.algorithms.base import Policy
from align_cluster.backbones.adapters import active_adapter
from align_cluster.backbones.attention import ShortAttention
from align_cluster.backbones.base import Backbone
from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import RewardSection
from align_cluster.rollouts.guidance import TextBatch, guided_velocity
from align_cluster.rollouts.steps import Step


class RewardGradient:
    """Computes rewards of the images that latents decode to, with a gradient to the latents. Nothing in it is trained.

    The VAE computes in the backbone's precision, rewards in fp32. With `checkpointing` it keeps no activations: images
    go one by one through VAE and rewards, and once more in the backward pass, which also recomputes the VAE's blocks.
    """

    def __init__(
        self, backbone: Backbone, rewards: Mapping[str, RewardSection], threads: int, checkpointing: bool
    ) -> None:
        self.backbone, self.checkpointing = backbone, checkpointing
        self.parts = [(section.weight, REWARDS[section.kind](section)) for section in rewards.values()]
        for _, reward in self.parts:
            reward.load(str(backbone.device), threads)
        if checkpointing:
            backbone.checkpoint_decoder()

    def __call__(self, latents: torch.Tensor, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return weighted sums of scores, fp32 [b, J], of latents fp32 [b, C, H, W] under J texts each."""
        if not self.checkpointing:
            return self._score(latents, texts)
        rows = zip(latents.split(1), texts, strict=True)
        return torch.cat([checkpoint(self._score, row, [own], use_reentrant=False) for row, own in rows])

    def _score(self, latents: torch.Tensor, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        images = ((self.backbone.pixels(latents) + 1) / 2).clamp(0, 1)
        with ShortAttention():  # here, because a backward pass may come here again
            return sum(weight * reward.against(images, texts) for weight, reward in self.parts)


@dataclass(frozen=True, kw_only=True)
class LearnerPolicy(Policy):
    """Shows one base with adapters to an algorithm, for one micro-batch's conditions and one kind of rollout step.

    `network` is called; `denoiser` is the module below its engine, whose adapters are switched. `reward_gradient` is
    there for algorithms that follow the gradient of rewards. With `null_gradient`, gradients flow through the null
    branch of a guided prediction too. With `perturbed`, predictions are made under `text` moved towards it by its
    `strength` at the noise level. `equal_adapters` have the default one's weights at present.
    """

    backbone: Backbone
    network: torch.nn.Module
    denoiser: torch.nn.Module
    step: Step
    text: TextBatch
    guidance: float
    perturbed: TextBatch | None = None
    strength: Callable[[float], float] | None = None
    null_gradient: bool = False
    reward_gradient: RewardGradient | None = None
    equal_adapters: frozenset[str] = frozenset()

    def follows(self, adapter: str) -> bool:
        """Return whether an adapter has the default one's weights."""
        return adapter in self.equal_adapters

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, adapter: str | None = "default") -> torch.Tensor:
        """Predict under an adapter, or under the bare base for None. Only the default adapter carries gradient."""
        with torch.set_grad_enabled(adapter == "default"), active_adapter(self.denoiser, adapter):
            text = self._text(sigma)
            return guided_velocity(self.backbone, self.network, x, sigma, text, self.guidance, self.null_gradient)

    def _text(self, sigma: torch.Tensor) -> TextBatch:
        if self.perturbed is None:
            return self.text
        weights = torch.tensor([self.strength(level) for level in sigma.tolist()], device=sigma.device)
        return self.text.towards(self.perturbed, weights)

    def rewards(self, latents: torch.Tensor, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return the trained rewards of latents under each of their texts, with a gradient to the latents."""
        return self.reward_gradient(latents, texts)
