"""What all backbones from a diffusers pipeline folder share: each part read alone, by path or hub id."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from align_cluster.backbones.base import Backbone
from align_cluster.backbones.levels import pipeline_sigmas
from align_cluster.conditions.perturb import E2po, learn
from align_cluster.embedded import pipeline_path
from align_cluster.errors import UserError
from align_cluster.files import atomic
from align_cluster.types import Condition, Perturbation

# Projections of a block in which text and image attend to each other.
JOINT_ATTENTION = tuple(
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)


class PipelineBackbone(Backbone):
    """A family subclasses this and says what its parts are called, how it embeds a prompt and calls its network.

    `pipelines` are the classes that model_index.json may name, `pipeline` the one that reads prompts and writes LoRA
    files; `network` is the denoiser's class and `part` its folder; `texts` are the parts that encode prompts.
    `blocks` are the classes of its layers that repeat, where the network does not say so itself. `family` is what users
    call it. `equal_levels`: whether the pipeline hands its scheduler equal steps from 1 to 1/N. `packed`: whether the
    network takes `pack`ed latents.
    """

    family: ClassVar[str]
    pipeline: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    network: ClassVar[str]
    blocks: ClassVar[tuple[str, ...]] = ()
    part: ClassVar[str] = "transformer"
    vae: ClassVar[str] = "AutoencoderKL"
    vae_layout: ClassVar[torch.memory_format] = torch.channels_last
    texts: ClassVar[tuple[str, ...]]
    equal_levels: ClassVar[bool] = False
    packed: ClassVar[bool] = False

    @property
    def source(self) -> str:
        path = self.config.path
        return str(pipeline_path()) if path == "embedded" else str(Path(path).expanduser()) if "~" in path else path

    @contextmanager
    def reading(self, part: str) -> Iterator[None]:
        """Turns a part that cannot be read into one sentence for the user."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"backbone.path: {self.config.path!r} has no readable {part!r} part: give 'embedded', a diffusers "
                f"folder of {self.family} pipeline, or a hub id that this machine can reach "
                f"({str(error).splitlines()[0]})"
            ) from error

    def stock(self, name: str) -> Any:
        """A class of diffusers."""
        import diffusers

        return getattr(diffusers, name)

    @cached_property
    def index(self) -> dict[str, Any]:
        """Content of model_index.json. UserError where the pipeline is of another family."""
        index = self.read_config(self.pipeline)
        if index.get("_class_name") not in self.pipelines:
            raise UserError(
                f"backbone.path: {self.config.path!r} is a {index.get('_class_name')}, and backbone.kind "
                f"{self.config.kind} takes a {' or '.join(self.pipelines)}; correct one of the two"
            )
        return index

    def read_config(self, cls: str, part: str | None = None) -> dict[str, Any]:
        """Settings of a part, or what parts there are, from the file that diffusers' class `cls` keeps them in."""
        with self.reading(part or "model_index.json"):
            return self.stock(cls).load_config(self.source, subfolder=part)

    def part_config(self, cls: str, part: str) -> dict[str, Any]:
        _ = self.index
        return self.read_config(cls, part)

    def on_meta(self, cls: str, part: str) -> torch.nn.Module:
        """Build a part from its settings alone, on the meta device: it has shapes and no weights."""
        with torch.device("meta"):
            return self.stock(cls).from_config(self.part_config(cls, part))

    @cached_property
    def network_config(self) -> dict[str, Any]:
        return self.part_config(self.network, self.part)

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        return self.part_config(self.vae, "vae")

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        return self.part_config("FlowMatchEulerDiscreteScheduler", "scheduler")

    @property
    def vae_factor(self) -> int:
        """Pixels a latent pixel, along one side."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self.network_config["in_channels"] // (self.patch**2 if self.packed else 1)

    @property
    def native_size(self) -> int:
        """Height and width of a latent, where no image size is set."""
        return self.network_config["sample_size"]

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        size = [self._side(name) for name in ("height", "width")]
        return self.channels, *size

    def _side(self, name: str) -> int:
        pixels, unit = getattr(self.config, name), self.vae_factor * self.patch
        if pixels is None:
            return self.native_size
        if pixels % unit:
            near = max(1, round(pixels / unit)) * unit
            raise UserError(
                f"backbone.{name} is {pixels}, which the model of {self.config.path!r} cannot divide into patches of "
                f"{unit} pixels; set it to {near}"
            )
        return pixels // self.vae_factor

    def call(self, guidance: float) -> dict[str, Any]:
        """Arguments, beside prompt and steps, under which the stock pipeline draws what this backbone does."""
        _, height, width = self.latent_shape
        return {"guidance_scale": guidance, "height": height * self.vae_factor, "width": width * self.vae_factor}

    def sigmas(self, steps: int) -> np.ndarray:
        return pipeline_sigmas(self.scheduler_config, steps, self.image_tokens, self.equal_levels)

    def load_denoiser(self) -> torch.nn.Module:
        _ = self.index
        with self.reading(self.part):
            model = self.stock(self.network).from_pretrained(self.source, subfolder=self.part, dtype=self.dtype)
        if self.config.attention:
            self._set_attention(model, self.config.attention)
        if self.config.compile:
            names = self.blocks or model._repeated_blocks
            for module in model.modules():
                if type(module).__name__ in names:
                    module.compile()
        return model.to(self.device).eval().requires_grad_(False)

    def _set_attention(self, model: torch.nn.Module, backend: str) -> None:
        try:
            model.set_attention_backend(backend)
        except (ValueError, RuntimeError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"backbone.attention is {backend}, which cannot be used here ({reason}); leave it out, or install it"
            ) from error

    @property
    def text_tokens(self) -> int:
        """Rows of the longest prompt's encoding: a CLIP's, unless the family says otherwise."""
        return self.part_config(self.network, "text_encoder")["max_position_embeddings"]

    @property
    def text_shape(self) -> tuple[int, int, int]:
        """(T, D, P) of the longest prompt's encoding: sequence [T, D] and pooled [P]."""
        config = self.network_config
        width = config.get("joint_attention_dim") or config["cross_attention_dim"]
        return self.text_tokens, width, config.get("pooled_projection_dim", 0)

    def text_parts(self) -> dict[str, Any]:
        """Parts of the pipeline that are not to be read from disk while prompts are encoded: by default all others."""
        others = [name for name in self.index if not name.startswith("_") and name not in self.texts]
        return dict.fromkeys(others)

    @property
    def text_device(self) -> torch.device:
        return self.device if self.config.text == "keep" else torch.device("cpu")

    @cached_property
    def _text(self) -> Any:
        """The stock pipeline with its text encoders only."""
        with self.reading("text_encoder"):
            pipeline = self.stock(self.pipeline).from_pretrained(self.source, dtype=self.dtype, **self.text_parts())
        for name in self.texts:
            part = getattr(pipeline, name, None)
            if isinstance(part, torch.nn.Module):
                part.to(self.text_device).requires_grad_(False)
        return pipeline

    @torch.no_grad()
    def encode(self, texts: list[str]) -> list[Condition]:
        conditions = []
        for text in texts:
            sequence, pooled = self.embed(self._text, text)
            arrays = (sequence.float().cpu().numpy(), pooled.float().cpu().numpy())
            conditions.append(Condition(self.condition_key(text), *arrays))
        self._release()
        return conditions

    @abstractmethod
    def embed(self, pipeline: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(sequence [T, D], pooled [P]) of one prompt, as the stock pipeline encodes it; P may be 0."""

    def _release(self) -> None:
        if self.config.text == "free":
            self.__dict__.pop("_text", None)

    def _identity(self, *parts: str) -> list:
        """Which files these parts are: name, size and time, or the hub id."""
        files = sorted(path for part in parts for path in Path(self.source).glob(f"{part}/*"))
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files] or [self.source]

    @cached_property
    def _text_identity(self) -> list:
        return self._identity(*self.texts)

    def text_settings(self) -> list:
        """Settings that an encoding depends on."""
        return []

    def condition_key(self, text: str) -> str:
        return address(self._text_identity, *self.text_settings(), str(self.dtype), text)

    @cached_property
    def _vae(self) -> torch.nn.Module:
        _ = self.index
        with self.reading("vae"):
            vae = self.stock(self.vae).from_pretrained(self.source, subfolder="vae", dtype=self.dtype)
        return vae.to(self.device, memory_format=self.vae_layout).eval().requires_grad_(False)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        pixels = self.pixels(latents.to(self.device))
        images = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Images fp32 [B, 3, H, W], about -1 to 1, of final latents; with a gradient where one is wanted."""
        config = self._vae.config
        z = latents / config.scaling_factor + (config.shift_factor or 0.0)
        with self.autocast():
            return self._vae.decode(z.to(self.dtype, memory_format=self.vae_layout)).sample.float()

    def checkpoint_decoder(self) -> None:
        """Let `pixels` compute activations again in a backward pass, block by block, where the VAE's class can."""
        if self._vae._supports_gradient_checkpointing:
            self._vae.enable_gradient_checkpointing()

    @torch.no_grad()
    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Latents fp32 [B, C, H, W] of images [B, 3, h, w] in [0, 1]: the encoder's mode, so that they are always the
        same."""
        config, images = self._vae.config, (2 * images - 1).to(self.device, self.dtype, memory_format=self.vae_layout)
        with self.autocast():
            z = self._vae.encode(images).latent_dist.mode().float()
        return (z - (config.shift_factor or 0.0)) * config.scaling_factor

    def save_lora(self, state: dict[str, np.ndarray], folder: Path) -> Path:
        from align_cluster.backbones.adapters import lora_config

        layers = {name: torch.from_numpy(value.copy()) for name, value in state.items()}
        about = lora_config(self).to_dict()
        path = folder / "pytorch_lora_weights.safetensors"
        with atomic(path) as file:
            self.stock(self.pipeline).save_lora_weights(
                folder,
                **{f"{self.part}_lora_layers": layers, f"{self.part}_lora_adapter_metadata": about},
                weight_name=file.name,
            )
        return path


class ClipExploration:
    """Of pipelines whose first text encoder is a CLIP, for E2PO: a mixin before PipelineBackbone.

    `layer` is the hidden state that enters a condition's sequence; None: the encoder's normalised output.
    """

    explorable: ClassVar[bool] = True
    layer: ClassVar[int | None] = -2

    def perturb(self, texts: list[str], config: E2po, seed: int) -> list[Perturbation]:
        """Learn perturbed encodings of prompts, each independent of the others."""
        keys = [self.perturbation_key(text, config, seed) for text in texts]
        found = learn(self._text.text_encoder, self._text.tokenizer, texts, keys, config, seed, self.layer)
        self._release()
        return found

    def perturbation_key(self, text: str, config: E2po, seed: int) -> str:
        """Content address of a prompt's perturbations: a hash of everything that they depend on."""
        # rho is phase 2's: it weighs perturbations that are there already.
        return address(self._clip_identity, str(self.dtype), config.model_dump(exclude={"rho"}), seed, text)

    @cached_property
    def _clip_identity(self) -> list:
        return self._identity("text_encoder", "tokenizer")

    def insert(self, condition: Condition, perturbation: Perturbation, variant: int) -> Condition:
        """The condition with its CLIP part replaced by variant 1 ... K - 1; variant 0 is the condition itself."""
        if variant == 0:
            return condition
        encoding = self.replaced(condition, perturbation.hidden[variant - 1], perturbation.pooled[variant - 1])
        return Condition(f"{condition.key}/{perturbation.key}/{variant}", *encoding)

    @abstractmethod
    def replaced(self, condition: Condition, hidden: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sequence, pooled) of the condition with CLIP's hidden states [S, d] and pooled vector in their places."""


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, H, W] as the tokens [B, H/2 W/2, 4C] of networks that make no patches themselves."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).mT.contiguous()


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The latents [B, C, height, width] that `pack` made tokens of."""
    return torch.nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (height // 2, width // 2)), 2)


def address(*facts: object) -> str:
    """A hash of everything that something depends on."""
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
