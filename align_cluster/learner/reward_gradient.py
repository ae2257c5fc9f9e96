"""From latents to rewards on the learner, with a gradient: the frozen VAE and the rewards that are trained on."""

from collections.abc import Mapping

import torch
from torch.utils.checkpoint import checkpoint

from align_cluster.backbones.base import Backbone
from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import RewardSection


class Judge:
    """Weighted sums of rewards of the images that latents decode to. Nothing in it is trained.

    The VAE computes in the backbone's precision, rewards in fp32. `frugal` keeps no activations: images go one by one
    through VAE and rewards, and again in the backward pass, where the VAE's blocks are computed again in turn.
    """

    def __init__(self, backbone: Backbone, rewards: Mapping[str, RewardSection], threads: int, frugal: bool) -> None:
        self.backbone, self.frugal = backbone, frugal
        self.parts = [(section.weight, REWARDS[section.kind](section)) for section in rewards.values()]
        for _, reward in self.parts:
            reward.load(str(backbone.device), threads)
        if frugal:
            backbone.checkpoint_decoder()

    def __call__(self, latents: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Scores fp32 [b, J] of latents fp32 [b, C, H, W] under J texts."""
        if not self.frugal:
            return self._judge(latents, texts)
        rows = [checkpoint(self._judge, row, texts, use_reentrant=False) for row in latents.split(1)]
        return torch.cat(rows)

    def _judge(self, latents: torch.Tensor, texts: list[str]) -> torch.Tensor:
        images = ((self.backbone.pixels(latents) + 1) / 2).clamp(0, 1)
        return sum(weight * reward.against(images, texts) for weight, reward in self.parts)
