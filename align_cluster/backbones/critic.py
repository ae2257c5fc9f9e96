"""A value function on noisy latents: the diffusion model's own features under a separate adapter, and a head.

After "Explicit Critic Guidance" (arXiv 2605.27736): V(x_k, sigma_k, text) estimates the reward of the image that x_k
becomes. The paper names attention over spatial tokens and an MLP with AdaLN; the sizes are engineering choices.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from align_cluster.backbones.adapters import active_adapter, adapter_parameters, add_adapters
from align_cluster.backbones.base import CRITIC, Backbone, CriticSection
from align_cluster.backbones.noising import clean

ADAPTED = ("lora", "copy")  # features that an adapter of the critic's own changes
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

    def forward(self, layers: list[torch.Tensor], sigma: torch.Tensor | None) -> torch.Tensor:
        """Return values [B, R] for the tokens of each tapped layer, [B, L, D], at noise levels sigma [B].

        Without noise levels the modulation is the same for all.
        """
        embedded = layers[0].new_zeros(len(layers[0]), FREQUENCIES) if sigma is None else sinusoid(sigma)
        level = self.level(embedded)
        return self.out(torch.cat([pool(tokens, level) for pool, tokens in zip(self.pooling, layers, strict=True)], -1))


def sinusoid(sigma: torch.Tensor) -> torch.Tensor:
    """Return the embedding [B, FREQUENCIES] of noise levels sigma [B], as diffusion models embed timesteps."""
    rates = torch.exp(-math.log(10_000) * torch.arange(FREQUENCIES // 2, device=sigma.device) / (FREQUENCIES // 2))
    angles = 1000 * sigma[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PixelEncoder(nn.Module):
    """Turns decoded images into tokens [B, L, width], one for each 8 x 8 pixels, that have looked at the prompt.

    The paper's baseline reads pixels; what reads them is ours: two convolutions, attention to the text, and an MLP.
    """

    def __init__(self, width: int, heads: int, text: int) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(3, width, 4, 4),
            nn.GELU(),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(width, width, 1),
        )
        self.norm, self.text = nn.LayerNorm(width), nn.Linear(text, width)
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, pixels: torch.Tensor, sequence: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return tokens of images fp32 [B, 3, H, W], about -1 to 1, under texts [B, T, D]; `mask` [B, T] or None."""
        tokens, text = self.look(pixels).flatten(2).transpose(1, 2), self.text(sequence)
        read, _ = self.attend(self.norm(tokens), text, text, None if mask is None else ~mask, need_weights=False)
        return tokens + read + self.mlp(tokens + read)


class Critic(nn.Module):
    """Computes values of noisy latents. The base stays frozen; `named` says what trains beside the head.

    `denoiser` is the actor's network with its adapters. With `features: lora` one of them is named "critic".
    """

    def __init__(
        self, backbone: Backbone, denoiser: nn.Module, rewards: int, settings: CriticSection, seed: int = 0
    ) -> None:
        super().__init__()
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        if settings.features == "copy":
            denoiser = add_adapters(backbone, backbone.load_denoiser(), (CRITIC,), seed)
        elif settings.features == "whole":
            denoiser = trainable_copy(backbone, settings.init)
        # A list hides the network from nn.Module, so that only what trains is saved.
        self._network, self.backbone, self.settings = [denoiser], backbone, settings
        self.encoder: PixelEncoder | None = None
        channels = [channels for _, channels in backbone.taps(denoiser)]
        torch.manual_seed(seed)
        if settings.features == "pixels":
            channels = [settings.width]
            self.encoder = PixelEncoder(settings.width, settings.heads, backbone.text_shape[1]).to(backbone.device)
        self.head = CriticHead(channels, rewards, settings.width, settings.heads).to(backbone.device)
        torch.set_rng_state(state)
        for parameter in self.trainable:
            parameter.requires_grad_(True)

    @property
    def network(self) -> nn.Module:
        """Return the network that gives the features: the actor's denoiser, or the critic's own copy."""
        return self._network[0]

    @property
    def adapter(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the critic's own adapter, or {} where it has none."""
        return adapter_parameters(self.network, CRITIC) if self.settings.features in ADAPTED else {}

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """Return the parameters to train by name: those of the head, and of the adapter, the copy or the encoder."""
        found = dict(self.named_parameters()) | {f"adapter.{name}": value for name, value in self.adapter.items()}
        if self.settings.features == "whole":
            found |= {f"network.{name}": value for name, value in self.network.named_parameters()}
        return found

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters to train."""
        return list(self.named.values())

    def active(self) -> AbstractContextManager[None]:
        """Activate the critic's adapter on the network inside the block, or none where it has none.

        A backward pass through checkpointed layers belongs inside as well: it computes them again under the adapter
        that is active at that time.
        """
        if self.settings.features == "whole":
            return nullcontext()
        return active_adapter(self.network, CRITIC if self.settings.features in ADAPTED else None)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        sequence: torch.Tensor,
        pooled: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return values fp32 [B, R] of latents x [B, C, H, W] at sigma [B], in units of the normalised rewards.

        Conditions are the text's own, without guidance. Gradient flows to x and to what trains only.
        """
        if not self.settings.text:
            sequence, pooled = torch.zeros_like(sequence), torch.zeros_like(pooled)
        with self.active(), captured(self.backbone, self.network) as layers:
            output = self.backbone.velocity(self.network, x, sigma, sequence, pooled, mask)
        if self.encoder:
            pixels = self.backbone.pixels(clean(x, output, sigma, self.backbone.prediction))
            layers = [self.encoder(pixels, sequence, mask)]
        return self.head([layer.float() for layer in layers], sigma if self.settings.level else None)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors by name, as `restore` takes them."""
        return {name: value.detach() for name, value in self.named.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Copy a state into this critic. Raises ValueError if it belongs to a critic of another shape."""
        own = self.state()
        odd = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
        if odd:
            raise ValueError(f"this critic's {odd[0]} does not match; features, width and rewards must be the same")
        for name, value in own.items():
            value.copy_(state[name])


def trainable_copy(backbone: Backbone, init: str) -> nn.Module:
    """Return a copy of the base in fp32, all of whose weights train. `init` random draws them anew, as layers do."""
    network = backbone.load_denoiser().float()
    for module in network.modules() if init == "random" else ():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        else:  # norms that only scale, and parameters of the network's own
            for name, value in module.named_parameters(recurse=False):
                nn.init.ones_(value) if name == "weight" else nn.init.zeros_(value)
    return network


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
