"""The contract of a backbone: load parts alone, encode, predict, decode. One code path serves rollout and learner."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from align_cluster.conditions.perturb import E2po
from align_cluster.config.base import Section
from align_cluster.types import Condition, Perturbation


class LoraSettings(Section):
    """Rank, scale and targets of the adapters. `targets: null` takes the backbone's published recipe."""

    rank: PositiveInt = 32
    alpha: PositiveFloat = 64
    targets: tuple[str, ...] | None = None


class BackboneSection(Section):
    """Settings that every backbone shares.

    `precision: bf16` runs the network under autocast (weights bf16 on a GPU, fp32 on a CPU); the LoRA is always fp32.
    """

    path: str = Field(description='"embedded", a local diffusers folder, or a hub id')
    precision: Literal["fp32", "bf16"] = "bf16"
    height: Annotated[int, Field(gt=0, multiple_of=16)] | None = None
    width: Annotated[int, Field(gt=0, multiple_of=16)] | None = None
    lora: LoraSettings = LoraSettings()


class Backbone(ABC):
    """A diffusion or flow model in parts. Constructing it loads nothing; each `load_*` loads one part, frozen, in
    eval mode.

    Latents and velocities are fp32 [B, C, H, W]; sigmas fp32; images uint8 [B, H, W, 3]. Flow convention (Lipman et
    al.; SD3 sec. 2): x_t = (1 - sigma) x0 + sigma eps, v = eps - x0.
    """

    prediction: Literal["flow", "epsilon", "v"]
    lora_targets: tuple[str, ...]
    explorable: ClassVar[bool] = False  # has a CLIP text encoder whose token embeddings can be perturbed

    def __init__(self, config: BackboneSection, device: str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of frozen weights."""
        return torch.bfloat16 if self.config.precision == "bf16" and self.device.type == "cuda" else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the configured image size."""

    @property
    def image_tokens(self) -> int:
        """Tokens of one latent in 2 x 2 patches, on which resolution-dependent schedules depend."""
        _, height, width = self.latent_shape
        return height * width // 4

    @abstractmethod
    def sigmas(self, steps: int) -> np.ndarray:
        """Noise levels of an N-step rollout, fp64 [N + 1], from 1 to 0."""

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

    def perturb(self, texts: list[str], config: E2po, seed: int) -> list[Perturbation]:
        """Learn perturbed encodings of prompts, each independent of the others. Of explorable backbones."""
        raise NotImplementedError

    def perturbation_key(self, text: str, config: E2po, seed: int) -> str:
        """Content address of a prompt's perturbations: a hash of everything that they depend on."""
        raise NotImplementedError

    def insert(self, condition: Condition, perturbation: Perturbation, variant: int) -> Condition:
        """The condition with its CLIP-L part replaced by variant 1 ... K - 1; variant 0 is the condition itself."""
        raise NotImplementedError

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

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Images of final latents; loads the VAE if needed."""

    @abstractmethod
    def save_lora(self, state: dict[str, np.ndarray], folder: Path) -> Path:
        """Write adapter weights as a safetensors file that the stock pipeline's `load_lora_weights` reads."""
