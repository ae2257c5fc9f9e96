"""The contract of a backbone: load parts alone, encode, predict, decode. One code path serves rollout and learner."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from align_cluster.settings import Root, Section
from align_cluster.types import Condition


class LoraSettings(Section):
    """Rank, scale and targets of the adapters. `targets: null` takes the backbone's published recipe. `init` is how A
    begins: `gaussian` with std 1/rank, as the published recipes do, or `kaiming`, peft's own; B begins at 0."""

    rank: PositiveInt = 32
    alpha: PositiveFloat = 64
    init: Literal["gaussian", "kaiming"] = "gaussian"
    targets: tuple[str, ...] | None = None


CRITIC = "critic"  # name of the critic's adapter


class CriticSection(Section):
    """What the critic is made of. `features: lora` are the shared base's under an adapter of the critic's own, `frozen`
    the bare base's, `copy` those of a second copy of the base with that adapter, which costs its memory again.

    The head has `width` channels and `heads` attention heads.
    """

    features: Literal["lora", "frozen", "copy"] = "lora"
    width: Annotated[int, Field(gt=0, multiple_of=8)] = 512
    heads: PositiveInt = 8

    def problems(self, where: str, run: Root) -> Iterator[str]:
        """Refuse a width that the heads cannot share."""
        if self.width % self.heads:
            yield f"{where}.width is {self.width}, which {self.heads} heads cannot share; set heads to 8"


class BackboneSection(Section):
    """Settings that every backbone shares.

    `precision: bf16` runs the network under autocast (weights bf16 on a GPU, fp32 on a CPU); the LoRA is always fp32.
    `text` is where encoders of prompts live: kept on the device, kept on the `cpu`, or there and freed after each use.
    `attention` names a backend of diffusers (null: torch's own). `compile` compiles the network's repeated blocks at
    their first use, in samplers and learners.
    """

    path: str = Field(description='"embedded", a local diffusers folder, or a hub id')
    precision: Literal["fp32", "bf16"] = "bf16"
    height: Annotated[int, Field(gt=0, multiple_of=16)] | None = None
    width: Annotated[int, Field(gt=0, multiple_of=16)] | None = None
    lora: LoraSettings = LoraSettings()
    text: Literal["keep", "cpu", "free"] = "keep"
    attention: str | None = None
    compile: bool = False


class Backbone(ABC):
    """A diffusion or flow model in parts. Constructing it loads nothing; each `load_*` loads one part, frozen, in
    eval mode.

    Latents and velocities are fp32 [B, C, H, W]; sigmas fp32; images uint8 [B, H, W, 3]. Flow convention (Lipman et
    al.; SD3 sec. 2): x_t = (1 - sigma) x0 + sigma eps, v = eps - x0. `flow` is False for a network that predicts
    epsilon or v over x_t = sqrt(1 - sigma^2) x0 + sigma eps; "velocity" then means what it predicts.
    """

    flow: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]]
    explorable: ClassVar[bool] = False  # has a CLIP text encoder whose token embeddings can be perturbed
    patch: ClassVar[int] = 2  # latent pixels a token, along one side
    pipelines: ClassVar[tuple[str, ...]] = ()  # classes that model_index.json may name; () where `path` has none
    critic_blocks: ClassVar[tuple[str, ...]] = ()  # the denoiser's lists of blocks that tokens pass, in order
    takes_distilled_guidance: ClassVar[bool] = False  # has an input for the strength of guidance
    tiny_last_level: ClassVar[bool] = False  # the pipeline's own last step begins near 0, as SD3's does (at .009)
    distilled_guidance: float | None = (
        None  # strength of guidance that a distilled network is told, where it is not the settings'
    )

    def __init__(self, config: BackboneSection, device: str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of frozen weights."""
        return torch.bfloat16 if self.config.precision == "bf16" and self.device.type == "cuda" else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    @property
    def prediction(self) -> Literal["flow", "epsilon", "v"]:
        """What the network predicts."""
        return "flow"

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the configured image size."""

    @property
    def image_tokens(self) -> int:
        """Tokens of one latent, on which resolution-dependent schedules depend."""
        _, height, width = self.latent_shape
        return height * width // self.patch**2

    @abstractmethod
    def sigmas(self, steps: int) -> np.ndarray:
        """Noise levels of an N-step rollout, fp64 [N + 1], falling; those of a flow go from 1 to 0."""

    @abstractmethod
    def load_denoiser(self) -> torch.nn.Module:
        """The velocity network, without adapters."""

    @abstractmethod
    def condition_key(self, text: str) -> str:
        """Content address of a prompt's encoding: a hash of everything that it depends on."""

    @abstractmethod
    def encode(self, texts: list[str]) -> list[Condition]:
        """Encode prompts one by one, so that a condition depends on its text alone. Loads the text encoders if
        needed."""

    @abstractmethod
    def velocity(
        self,
        denoiser: torch.nn.Module,
        x: torch.Tensor,
        sigma: torch.Tensor,
        sequence: torch.Tensor,
        pooled: torch.Tensor,
    ) -> torch.Tensor:
        """Predicted velocity, fp32, like x; sigma [B], sequence [B, T, D], pooled [B, P]."""

    def guide(self, v: torch.Tensor, v_null: torch.Tensor, guidance: float) -> torch.Tensor:
        """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""
        return v_null + guidance * (v - v_null)

    def taps(self, denoiser: torch.nn.Module) -> list[tuple[torch.nn.Module, int]]:
        """Layers whose output a critic reads, and their channels: of a transformer the middle and the last block."""
        blocks = [block for name in self.critic_blocks for block in getattr(denoiser, name)]
        channels = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim
        return [(blocks[index], channels) for index in sorted({len(blocks) // 2, len(blocks) - 1})]

    @classmethod
    def has_taps(cls) -> bool:
        """Return whether a critic can read this backbone: `critic_blocks` are named, or `taps` is its own."""
        return bool(cls.critic_blocks) or cls.taps is not Backbone.taps

    def tokens(self, output: object) -> torch.Tensor:
        """Image tokens [B, L, D] of a tapped layer's output: of a transformer block the part after the text's."""
        return output[1] if isinstance(output, tuple) else output

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Images of final latents; loads the VAE if needed."""

    @abstractmethod
    def save_lora(self, state: dict[str, np.ndarray], folder: Path) -> Path:
        """Write adapter weights as a safetensors file that the stock pipeline's `load_lora_weights` reads."""
