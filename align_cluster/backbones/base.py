"""The contract of a backbone: load parts alone, encode, predict, decode. Rollout and learner share this code."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from align_cluster.backbones.lora_file import Lora, lora_file, read_lora
from align_cluster.settings import ModelSource, Root, Section
from align_cluster.types import Condition


class LoraSettings(Section):
    """Configures rank, scale and targets of the LoRA adapters, which have no dropout, and a LoRA to start from."""

    reads = {"path": ModelSource("the .safetensors file of a LoRA, or its folder", file=True, ids="(?!)")}
    path: str | None = None
    """A LoRA to start from: the .safetensors file that a run, diffusers, peft, kohya's trainer or ComfyUI has, or its
    folder. `rank` and `alpha` are then the file's, unless they are stated, and `targets` must be its layers. null
    starts from the base model alone."""
    use: Literal["train", "merge"] = "train"
    """What becomes of the LoRA at `path`. `train` goes on training it; the reference of a KL is then still the base
    model without it. `merge` adds it into the base model, with a new adapter beside it: the reference has it, and
    `rank`, `alpha` and `targets` are free."""
    rank: PositiveInt = 32
    """The rank of each adapter. A larger one can change the model more and takes more memory. Flow-GRPO and
    DiffusionNFT use 32 on SD3.5-M, DanceGRPO 128 on FLUX.1."""
    alpha: PositiveFloat = 64
    """The scale of the adapters: their output is multiplied by alpha / rank. Flow-GRPO and DiffusionNFT use 64, twice
    the rank."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """How the matrix A begins: `gaussian` with a standard deviation of 1 / rank, as in the published recipes, or
    `kaiming`, peft's default. B begins at 0 in both, so a new adapter changes nothing."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The layers that get adapters, by the ends of their names, such as attn.to_q. null takes the backbone's published
    recipe."""

    def without_start(self) -> "LoraSettings":
        """Return the settings of adapters that get other weights than those at `path`, which may be gone."""
        return self.model_copy(update={"path": None}) if self.starts else self

    @property
    def starts(self) -> bool:
        """Return whether adapters begin with the LoRA at `path`."""
        return self.path is not None and self.use == "train"

    @property
    def merges(self) -> bool:
        """Return whether the LoRA at `path` becomes part of the base model."""
        return self.path is not None and self.use == "merge"

    @model_validator(mode="before")
    @classmethod
    def is_as_large_as_its_file(cls, data: Any) -> Any:
        """Take rank and alpha that are not stated from the file of a LoRA that is trained on."""
        if not isinstance(data, dict) or data.get("use", "train") != "train" or {"rank", "alpha"} <= data.keys():
            return data
        lora = _found(data.get("path"))
        return {"rank": lora.rank, "alpha": lora.alpha} | data if lora else data

    def problems(self, where: str, run: Root) -> Iterator[str]:
        """Refuse another rank than that of the file, and a use of no file."""
        lora = _found(self.path) if self.starts else None
        if lora and lora.rank != self.rank:
            yield f"{where}.rank is {self.rank}, and {self.path} has rank {lora.rank}; leave rank out"
        if self.path is None and self.use == "merge":
            yield f"{where}.use is merge, and {where}.path names no LoRA; give one, or leave use out"


def _found(path: Any) -> Lora | None:
    """Return the LoRA at `path`, or None where no file is there."""
    file = lora_file(path) if isinstance(path, str) else None
    return read_lora(file, Path(path)) if file and file.is_file() else None


CRITIC = "critic"  # name of the critic's adapter


class CriticSection(Section):
    """Configures the critic's network: the diffusion model's own features, and a head that turns them into values."""

    features: Literal["lora", "frozen", "copy", "whole", "pixels"] = "lora"
    """What the critic reads. `lora`: features of the shared base under an adapter of the critic's own; `frozen`: those
    of the bare base. `copy` takes a second copy of the base with such an adapter, and `whole` trains all weights of
    that copy, in fp32. `pixels`, the paper's baseline, decodes the image that one step of the base predicts, which
    takes the VAE, and reads it with a small network of its own."""
    init: Literal["pretrained", "random"] = "pretrained"
    """How the weights of `features: whole` begin: with the base's, or at `random`, which shows what the base knew."""
    text: bool = True
    """Whether the critic knows the prompt. Without it, it reads all states under a text of zeros."""
    level: bool = True
    """Whether the head knows the noise level, which then modulates it (AdaLN). The base's own layers always know it."""
    width: Annotated[int, Field(gt=0, multiple_of=8)] = 512
    """The channels of the head, a multiple of 8 and of `heads`. The default is ours, because the paper's summary leaves
    it open. The recipe of the embedded model takes 64."""
    heads: PositiveInt = 8
    """The number of attention heads in the head. The default is ours, as for `width`."""

    def problems(self, where: str, run: Root) -> Iterator[str]:
        """Refuse a width that the heads cannot share, and random weights that nothing would train."""
        if self.width % self.heads:
            yield f"{where}.width is {self.width}, which {self.heads} heads cannot share; set heads to 8"
        if self.init == "random" and self.features != "whole":
            yield (
                f"{where}.init is random, and with features {self.features} nothing would train these weights; set "
                "features to whole, or init to pretrained"
            )


class BackboneSection(Section):
    """Holds the settings that every backbone shares."""

    reads = {"path": None}
    path: str
    """The model: a local folder in diffusers' format, a hub id, or with kind sd3 "embedded", the small model of this
    package."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """The number format of the network. `bf16` computes under autocast, with frozen weights in bf16 on a GPU and in
    fp32 on a CPU. On a GPU, `fp32` is slower and takes more memory. The LoRA is always fp32."""
    height: Annotated[int, Field(gt=0, multiple_of=16)] | None = None
    """The height of the images in pixels, a multiple of 16. null takes the model's own. Train at the size that you want
    to draw at: FLUX.1 trained at 720 pixels shows a grid at 1024."""
    width: Annotated[int, Field(gt=0, multiple_of=16)] | None = None
    """The width of the images in pixels, a multiple of 16. null takes the model's own."""
    lora: LoraSettings = LoraSettings()
    """The adapters that are trained. The base model never changes."""
    text: Literal["keep", "cpu", "free"] = "keep"
    """Where the text encoders live: `keep` on the sampler's device, `cpu`, or `free`, which runs them on the CPU and
    frees them after each use. Choose cpu or free where GPU memory is short."""
    attention: str | None = None
    """The attention backend of diffusers, by its name, such as flash or sage. null takes PyTorch's own. Most others
    need a package that is installed apart."""
    compile: bool = False
    """Whether samplers and learners compile the network's repeated blocks at their first use. It pays in long runs
    only: on CPUs the first step waits for minutes. Algorithms that compare log-probs then need a
    `learner.ratio_tolerance` of at least 0.001."""


class Backbone(ABC):
    """Wraps a diffusion or flow model in parts. The constructor loads nothing; each part loads alone, frozen.

    Latents and velocities are fp32 [B, C, H, W], sigmas fp32, images uint8 [B, H, W, 3]. Flow convention (Lipman et
    al.; SD3 sec. 2): x_t = (1 - sigma) x0 + sigma eps, v = eps - x0. A network that predicts epsilon or v has `flow =
    False` and x_t = sqrt(1 - sigma^2) x0 + sigma eps; "velocity" then means the network's prediction.

    lora_targets         layers that get adapters by default
    explorable           a CLIP text encoder has token embeddings that E2PO can perturb
    clips                those encoders, the first one first: names of encoder and tokenizer in the pipeline
    patch                latent pixels a token, along one side
    distilled_guidance   guidance strength that is fed to a distilled network (None: the settings' value)
    """

    flow: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]]
    explorable: ClassVar[bool] = False
    clips: ClassVar[tuple[tuple[str, str], ...]] = ()
    patch: ClassVar[int] = 2
    pipelines: ClassVar[tuple[str, ...]] = ()
    critic_blocks: ClassVar[tuple[str, ...]] = ()
    takes_distilled_guidance: ClassVar[bool] = False
    tiny_last_level: ClassVar[bool] = False
    distilled_guidance: float | None = None

    def __init__(self, config: BackboneSection, device: str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)

    @classmethod
    def imports(cls) -> tuple[str, ...]:
        """Return what loading imports, in the form of `pkgutil.resolve_name`, so that a worker may start with it."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        """Return the storage type of frozen weights."""
        return torch.bfloat16 if self.config.precision == "bf16" and self.device.type == "cuda" else torch.float32

    def autocast(self) -> torch.autocast:
        """Return the context under which the network runs: bf16 autocast, or nothing with `precision: fp32`."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    @property
    def prediction(self) -> Literal["flow", "epsilon", "v"]:
        """Return what the network predicts."""
        return "flow"

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of one latent at the configured image size."""

    @property
    def image_tokens(self) -> int:
        """Return the number of tokens of one latent, which resolution-dependent schedules depend on."""
        _, height, width = self.latent_shape
        return height * width // self.patch**2

    @abstractmethod
    def sigmas(self, steps: int) -> np.ndarray:
        """Return the noise levels of an N-step rollout, fp64 [N + 1], falling; a flow's go from 1 to 0."""

    def problems(self, steps: Iterable[int]) -> Iterator[str]:
        """Yield a sentence for each setting with which the model cannot draw, among them these numbers of steps.

        No weights are loaded and nothing is downloaded: what is not on this machine is not judged.
        """
        yield from ()

    def text_notes(self, texts: Sequence[str]) -> Iterator[str]:
        """Yield a sentence where prompts are longer than the text encoders read, as far as tokenizers are here."""
        yield from ()

    @abstractmethod
    def load_denoiser(self) -> torch.nn.Module:
        """Load the velocity network, without adapters."""

    @abstractmethod
    def condition_key(self, text: str) -> str:
        """Return the content address of a prompt's encoding: a hash of everything that it depends on."""

    @abstractmethod
    def encode(self, texts: list[str]) -> list[Condition]:
        """Encode prompts one by one, so that a condition depends on its text alone.

        The text encoders load at the first call.
        """

    @abstractmethod
    def velocity(
        self,
        denoiser: torch.nn.Module,
        x: torch.Tensor,
        sigma: torch.Tensor,
        sequence: torch.Tensor,
        pooled: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the predicted velocity, fp32 like x, for sigma [B], sequence [B, T, D] and pooled [B, P].

        `mask` bool [B, T] is False where a sequence is padded (None: nowhere). A backbone whose prompts all have
        encodings of one length never gets one.
        """

    def guide(self, v: torch.Tensor, v_null: torch.Tensor, guidance: float) -> torch.Tensor:
        """Apply classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""
        return v_null + guidance * (v - v_null)

    def taps(self, denoiser: torch.nn.Module) -> list[tuple[torch.nn.Module, int]]:
        """Return the layers that a critic reads, each with its number of channels.

        A transformer's are its middle and its last block.
        """
        blocks = [block for name in self.critic_blocks for block in getattr(denoiser, name)]
        channels = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim
        return [(blocks[index], channels) for index in sorted({len(blocks) // 2, len(blocks) - 1})]

    @classmethod
    def has_taps(cls) -> bool:
        """Return whether a critic can read this backbone: `critic_blocks` are named, or `taps` is its own."""
        return bool(cls.critic_blocks) or cls.taps is not Backbone.taps

    def tokens(self, output: object) -> torch.Tensor:
        """Return the image tokens [B, L, D] in a tapped layer's output.

        A block with joint attention returns (text, image), so its second output is taken.
        """
        return output[1] if isinstance(output, tuple) else output

    @abstractmethod
    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Return images fp32 [B, 3, H, W] of final latents, about -1 to 1, with a gradient to the latents. The VAE
        loads at the first call."""

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Return uint8 images [B, H, W, 3] of final latents."""
        return rounded(self.pixels(latents.to(self.device)))

    @abstractmethod
    def save_lora(self, state: dict[str, np.ndarray], folder: Path) -> Path:
        """Write adapter weights as a safetensors file that the stock `load_lora_weights` reads, and return its path."""


def rounded(pixels: torch.Tensor) -> np.ndarray:
    """Return pixels fp32 [B, 3, H, W], -1 to 1, as images uint8 [B, H, W, 3], rounded as stock pipelines round them."""
    images = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
