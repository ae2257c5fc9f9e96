"""A value function on noisy latents: the diffusion model's own features under a separate adapter, and a head.

After "Explicit Critic Guidance" (arXiv 2605.27736): V(x_k, sigma_k, text) estimates the reward of the image that x_k
becomes. The paper names attention over spatial tokens and an MLP with AdaLN; the sizes are engineering choices.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from align_cluster.backbones.adapters import active_adapter, adapter_parameters, add_adapters
from align_cluster.backbones.base import CRITIC, Backbone, CriticSection

FREQUENCIES = 256  # width of the sinusoidal embedding of 1000 sigma


class Pooling(nn.Module):
    """One learned query attends to a layer's tokens [B, L, D], and an MLP follows. The noise level modulates both.

    The modulation is AdaLN. At first nothing is modulated and both gates are open. Closed gates (AdaLN-zero), before a
    last layer that begins at 0, would let the tokens in only after both have moved, which takes hundreds of updates.
    """

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(width) / width**0.5)
        self.norm = nn.LayerNorm(channels)
        self.read = nn.Linear(channels, 2 * width)
        self.ask, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight), nn.init.zeros_(self.modulation.bias)
        with torch.no_grad():
            self.modulation.bias.unflatten(0, (6, -1))[[2, 5]] = 1  # the gates

    def forward(self, tokens: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Return [B, width] for tokens [B, L, D]; `level` [B, width] embeds the noise level."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(F.silu(level)).chunk(6, dim=-1)
        query = self.query.expand(len(tokens), -1)
        asked = self.ask(F.layer_norm(query, query.shape[-1:]) * (1 + scale) + shift)[:, None]
        key, value = self.read(self.norm(tokens)).chunk(2, dim=-1)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (asked, key, value)]
        q, k = (F.rms_norm(part, part.shape[-1:]) for part in split[:2])
        seen = F.scaled_dot_product_attention(q, k, split[2]).transpose(1, 2).flatten(1)
        query = query + gate * self.out(seen)
        return query + gate_mlp * self.mlp(F.layer_norm(query, query.shape[-1:]) * (1 + scale_mlp) + shift_mlp)


class CriticHead(nn.Module):
    """Computes values [B, R] from the tokens of tapped layers. The last layer begins at 0, so all values do."""

    def __init__(self, channels: list[int], rewards: int, width: int, heads: int) -> None:
        super().__init__()
        self.level = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.pooling = nn.ModuleList([Pooling(size, width, heads) for size in channels])
        joined = width * len(channels)
        self.last = nn.Linear(width, rewards)
        self.out = nn.Sequential(nn.LayerNorm(joined), nn.Linear(joined, width), nn.GELU(), self.last)
        nn.init.zeros_(self.last.weight), nn.init.zeros_(self.last.bias)

    def forward(self, layers: list[torch.Tensor], sigma: torch.Tensor) -> torch.Tensor:
        """Return values [B, R] for the tokens of each tapped layer, [B, L, D], at noise levels sigma [B]."""
        rates = torch.exp(-math.log(10_000) * torch.arange(FREQUENCIES // 2, device=sigma.device) / (FREQUENCIES // 2))
        angles = 1000 * sigma[:, None] * rates
        level = self.level(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return self.out(torch.cat([pool(tokens, level) for pool, tokens in zip(self.pooling, layers, strict=True)], -1))


class Critic(nn.Module):
    """Computes values of noisy latents. The base stays frozen; the head and the critic's own adapter train.

    `denoiser` is the actor's network with its adapters. With `features: lora` one of them is named "critic".
    """

    def __init__(
        self, backbone: Backbone, denoiser: nn.Module, rewards: int, settings: CriticSection, seed: int = 0
    ) -> None:
        super().__init__()
        if settings.features == "copy":
            denoiser = add_adapters(backbone, backbone.load_denoiser(), (CRITIC,), seed)
        # A list hides the network from nn.Module, so that only the head and the adapter are saved and trained.
        self._network, self.backbone, self.settings = [denoiser], backbone, settings
        taps = backbone.taps(denoiser)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        self.head = CriticHead([channels for _, channels in taps], rewards, settings.width, settings.heads)
        torch.set_rng_state(state)
        self.head.to(backbone.device)
        for parameter in self.trainable:
            parameter.requires_grad_(True)

    @property
    def network(self) -> nn.Module:
        """Return the network that gives the features: the actor's denoiser, or the critic's own copy."""
        return self._network[0]

    @property
    def adapter(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the critic's own adapter, or {} with frozen features."""
        return {} if self.settings.features == "frozen" else adapter_parameters(self.network, CRITIC)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters to train: those of the head and of the adapter."""
        return [*self.head.parameters(), *self.adapter.values()]

    def active(self) -> AbstractContextManager[None]:
        """Activate the critic's adapter on the network inside the block.

        A backward pass through checkpointed layers belongs inside as well: it computes them again under the adapter
        that is active at that time.
        """
        return active_adapter(self.network, None if self.settings.features == "frozen" else CRITIC)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        sequence: torch.Tensor,
        pooled: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return values fp32 [B, R] of latents x [B, C, H, W] at sigma [B], in units of the normalised rewards.

        Conditions are the text's own, without guidance. Gradient flows to x, the head and the adapter only.
        """
        with self.active(), captured(self.backbone, self.network) as layers:
            self.backbone.velocity(self.network, x, sigma, sequence, pooled, mask)
        return self.head([layer.float() for layer in layers], sigma)

    def state(self) -> dict[str, torch.Tensor]:
        """Return head and adapter tensors by name, as `restore` takes them."""
        head = {f"head.{name}": value.detach() for name, value in self.head.state_dict().items()}
        return head | {f"adapter.{name}": value.detach() for name, value in self.adapter.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Copy a state into this critic. Raises ValueError if it belongs to a critic of another shape."""
        own = self.state()
        odd = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
        if odd:
            raise ValueError(f"this critic's {odd[0]} does not match; features, width and rewards must be the same")
        for name, value in own.items():
            value.copy_(state[name])


@contextmanager
def captured(backbone: Backbone, denoiser: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list that collects the tokens [B, L, D] of tapped layers during forward passes, in their order."""
    layers: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, output: layers.append(backbone.tokens(output)))
        for module, _ in backbone.taps(denoiser)
    ]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()
