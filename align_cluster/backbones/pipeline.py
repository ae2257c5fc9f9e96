"""Shared code of all backbones that come from a diffusers pipeline folder or hub id. Each part is read alone."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from align_cluster.backbones import lora_start
from align_cluster.backbones.attention import shorten_attention
from align_cluster.backbones.base import Backbone
from align_cluster.backbones.levels import pipeline_sigmas
from align_cluster.backbones.parts import cut, settings_of, unknown
from align_cluster.conditions.address import address
from align_cluster.conditions.precision import to_array
from align_cluster.embedded import WORLD, pipeline_path
from align_cluster.errors import UserError, hub_refusal
from align_cluster.files import atomic, sort_metadata
from align_cluster.types import Condition

SHOWN = 5  # unknown words that a note names

# The projections of a block with joint attention between text and image.
JOINT_ATTENTION = tuple(
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)


class PipelineBackbone(Backbone):
    """Wraps a family of diffusers pipelines. A subclass names its parts, embeds prompts and calls its network.

    family         what users call it, with its article
    pipelines      classes that model_index.json may name
    pipeline       the class that reads prompts and writes LoRA files
    network        the denoiser's class
    part           the denoiser's folder
    blocks         classes of the layers that repeat, if the network does not name them itself
    vae            the VAE's class
    vae_layout     memory format of the VAE's weights
    texts          the parts that encode prompts
    equal_levels   whether the pipeline passes equal steps from 1 to 1/N to its scheduler
    packed         whether the network takes latents that `pack` has turned into tokens
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

    @classmethod
    def imports(cls) -> tuple[str, ...]:
        """The parts' classes."""
        return tuple(f"diffusers:{name}" for name in (cls.pipeline, cls.network, cls.vae))

    @property
    def source(self) -> str:
        """Return the folder or hub id that parts are read from."""
        path = self.config.path
        return str(pipeline_path()) if path == "embedded" else str(Path(path).expanduser()) if "~" in path else path

    @contextmanager
    def reading(self, part: str) -> Iterator[None]:
        """Turn the error of a part that cannot be read into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"backbone.path: {self.config.path!r} has no readable {part!r} part: give 'embedded', a diffusers "
                f"folder of {self.family} pipeline, or a hub id that this machine can reach "
                f"({hub_refusal(error) or str(error).splitlines()[0]})"
            ) from error

    def stock(self, name: str) -> Any:
        """Return a class of diffusers by name."""
        import diffusers

        return getattr(diffusers, name)

    @cached_property
    def index(self) -> dict[str, Any]:
        """Return the content of model_index.json. Raises UserError if the pipeline is of another family."""
        index = self.read_config(self.pipeline)
        if index.get("_class_name") not in self.pipelines:
            raise UserError(
                f"backbone.path: {self.config.path!r} is a {index.get('_class_name')}, and backbone.kind "
                f"{self.config.kind} takes a {' or '.join(self.pipelines)}; correct one of the two"
            )
        return index

    def read_config(self, cls: str, part: str | None = None) -> dict[str, Any]:
        """Return the settings of a part, or the pipeline's index, from the file where diffusers' `cls` keeps them."""
        with self.reading(part or "model_index.json"):
            found = settings_of(self.source, part)
            return self.stock(cls).load_config(self.source, subfolder=part) if found is None else found

    def part_config(self, cls: str, part: str) -> dict[str, Any]:
        """Return the settings of a part, after a check that the pipeline is of this family."""
        _ = self.index
        return self.read_config(cls, part)

    def on_meta(self, cls: str, part: str) -> torch.nn.Module:
        """Build a part from its settings alone, on the meta device: it has shapes and no weights."""
        with torch.device("meta"):
            return self.stock(cls).from_config(self.part_config(cls, part))

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """Return the denoiser's settings."""
        return self.part_config(self.network, self.part)

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """Return the VAE's settings."""
        return self.part_config(self.vae, "vae")

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """Return the scheduler's settings."""
        return self.part_config("FlowMatchEulerDiscreteScheduler", "scheduler")

    @property
    def vae_factor(self) -> int:
        """Return the number of image pixels for one latent pixel, along one side."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def channels(self) -> int:
        """Return the number of channels of a latent."""
        return self.network_config["in_channels"] // (self.patch**2 if self.packed else 1)

    @property
    def native_size(self) -> int:
        """Return the height and width of a latent if the settings name no image size."""
        return self.network_config["sample_size"]

    @property
    def largest_side(self) -> int | None:
        """Return the largest height and width of a latent that the network has positions for, None for any."""
        return None

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W). Raises UserError if the image size does not divide into patches, or is too large."""
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
        if self.largest_side and pixels > self.largest_side * self.vae_factor:
            raise UserError(
                f"backbone.{name} is {pixels}, and the model of {self.config.path!r} has positions for "
                f"{self.largest_side * self.vae_factor} pixels; set it to at most that"
            )
        return pixels // self.vae_factor

    def problems(self, steps: Iterable[int]) -> Iterator[str]:
        """Ask for the latent's shape and the noise levels, which the parts' settings decide."""
        parts = (None, self.part, "vae", "scheduler")
        if not (Path(self.source).is_dir() or all(settings_of(self.source, part) for part in parts)):
            return
        for ask in (lambda: self.latent_shape, *(partial(self.sigmas, count) for count in steps)):
            try:
                ask()
            except UserError as error:
                yield str(error)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                yield (
                    f"backbone.path is {self.config.path}, whose settings cannot be used ({type(error).__name__}: "
                    f"{error}); give the model as diffusers wrote it"
                )

    def call(self, guidance: float) -> dict[str, Any]:
        """Return the arguments, besides prompt and steps, with which the stock pipeline draws the same images."""
        _, height, width = self.latent_shape
        return {"guidance_scale": guidance, "height": height * self.vae_factor, "width": width * self.vae_factor}

    def sigmas(self, steps: int) -> np.ndarray:
        """Return the levels of the pipeline's own scheduler."""
        return pipeline_sigmas(self.scheduler_config, steps, self.image_tokens, self.equal_levels)

    def load_denoiser(self) -> torch.nn.Module:
        """Load the network, choose its attention backend, and compile its repeated blocks if the settings say so."""
        _ = self.index
        with self.reading(self.part):
            model = self.stock(self.network).from_pretrained(self.source, subfolder=self.part, dtype=self.dtype)
        if self.config.lora.merges:
            lora_start.merge(self, model)
        if self.config.attention:
            self._set_attention(model, self.config.attention)
        if self.config.compile:
            names = self.blocks or model._repeated_blocks
            for module in model.modules():
                if type(module).__name__ in names:
                    module.compile()
        if self.device.type == "cpu" and not self.config.compile:
            shorten_attention(model)
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
    def clip_tokens(self) -> int:
        """Return the number of tokens that the first text encoder, a CLIP, reads."""
        return self.part_config(self.network, "text_encoder")["max_position_embeddings"]

    def readers(self) -> dict[str, int]:
        """Return the tokens of a prompt, with their marks, that are read through each tokenizer, by its part's name."""
        return {"tokenizer": self.clip_tokens}

    def text_notes(self, texts: Sequence[str]) -> Iterator[str]:
        """Count the texts that every text encoder cuts, those that are the same to all of them, and those with words
        that the first of them does not know."""
        if settings_of(self.source, "text_encoder") is None:
            return
        readers, texts = self.readers(), list(dict.fromkeys(texts))
        if strange := unknown(self.source, "tokenizer", texts):
            words = list(dict.fromkeys(word for found in strange.values() for word in found))
            more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
            world = f"; the embedded model knows {WORLD}" if self.config.path == "embedded" else ""
            yield (
                f"{_share(strange, texts)} words that the text encoder does not know, and nothing "
                f"of them is drawn: {', '.join(map(repr, words[:SHOWN]))}{more}{world}"
            )
        left = cut(self.source, readers, texts)
        if left:
            heads = Counter(left.values())
            same = sum(heads[head] > 1 for head in left.values())
            yield (
                f"{_share(left, texts)} more than the {max(readers.values())} tokens that the text "
                f"encoders read, such as {next(iter(left))[:60]!r}...: the rest is not drawn"
                + (f", and {same} of them draw the same as another" if same else "")
            )

    @property
    def text_tokens(self) -> int:
        """Return the rows of the longest prompt's encoding: a CLIP's, unless the family says otherwise."""
        return self.clip_tokens

    @property
    def text_shape(self) -> tuple[int, int, int]:
        """Return (T, D, P) of the longest prompt's encoding: sequence [T, D] and pooled [P]."""
        config = self.network_config
        width = config.get("joint_attention_dim") or config["cross_attention_dim"]
        return self.text_tokens, width, config.get("pooled_projection_dim", 0)

    def text_parts(self) -> dict[str, Any]:
        """Return what replaces (None) the pipeline parts that prompts need not: by default all other parts."""
        others = [name for name in self.index if not name.startswith("_") and name not in self.texts]
        return dict.fromkeys([*others, *self.unread])

    @property
    def unread(self) -> tuple[str, ...]:
        """Return the text encoders and tokenizers that this run does without: by default none."""
        return ()

    @property
    def text_device(self) -> torch.device:
        """Return the device on which the text encoders run."""
        return self.device if self.config.text == "keep" else torch.device("cpu")

    @cached_property
    def _text(self) -> Any:
        """Return the stock pipeline with its text encoders only."""
        with self.reading("text_encoder"):
            pipeline = self.stock(self.pipeline).from_pretrained(self.source, dtype=self.dtype, **self.text_parts())
        for name in self.texts:
            part = getattr(pipeline, name, None)
            if isinstance(part, torch.nn.Module):
                part.to(self.text_device).requires_grad_(False)
        return pipeline

    @torch.no_grad()
    def encode(self, texts: list[str]) -> list[Condition]:
        """Encode prompts one by one with the stock pipeline's encoders."""
        conditions = []
        for text in texts:
            sequence, pooled = self.embed(self._text, text)
            conditions.append(Condition(self.condition_key(text), to_array(sequence), to_array(pooled)))
        self._release()
        return conditions

    @abstractmethod
    def embed(self, pipeline: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sequence [T, D], pooled [P]) of one prompt, as the stock pipeline encodes it; P may be 0."""

    def _release(self) -> None:
        if self.config.text == "free":
            self.__dict__.pop("_text", None)

    def _identity(self, *parts: str) -> list:
        """Return the identity of the files of these parts: name, size and time, or the hub id."""
        files = sorted(path for part in parts for path in Path(self.source).glob(f"{part}/*"))
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files] or [self.source]

    @cached_property
    def _text_identity(self) -> list:
        return self._identity(*self.texts)

    def text_settings(self) -> list:
        """Return the settings that an encoding depends on."""
        return []

    def condition_key(self, text: str) -> str:
        """The key covers the text encoders' files, their settings and type, the text, and the code."""
        return address(type(self).embed, self._text_identity, *self.text_settings(), str(self.dtype), text)

    @cached_property
    def _vae(self) -> torch.nn.Module:
        _ = self.index
        with self.reading("vae"):
            vae = self.stock(self.vae).from_pretrained(self.source, subfolder="vae", dtype=self.dtype)
        if self.device.type == "cpu":
            shorten_attention(vae)
        return vae.to(self.device, memory_format=self.vae_layout).eval().requires_grad_(False)

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode with the VAE."""
        config = self._vae.config
        z = latents / config.scaling_factor + (config.shift_factor or 0.0)
        with self.autocast():
            return self._vae.decode(z.to(self.dtype, memory_format=self.vae_layout)).sample.float()

    def checkpoint_decoder(self) -> None:
        """Let the backward pass of `pixels` recompute activations block by block, if the VAE's class supports it."""
        if self._vae._supports_gradient_checkpointing:
            self._vae.enable_gradient_checkpointing()

    @torch.no_grad()
    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Return latents fp32 [B, C, H, W] of images [B, 3, h, w] in [0, 1].

        The encoder's mode is taken, so the result is always the same.
        """
        config, images = self._vae.config, (2 * images - 1).to(self.device, self.dtype, memory_format=self.vae_layout)
        with self.autocast():
            z = self._vae.encode(images).latent_dist.mode().float()
        return (z - (config.shift_factor or 0.0)) * config.scaling_factor

    def save_lora(self, state: dict[str, np.ndarray], folder: Path) -> Path:
        """Write pytorch_lora_weights.safetensors, with peft's configuration in its metadata.

        The scale alpha / rank goes into the B matrices, and alpha becomes the rank, because older diffusers and other
        tools read no metadata and take a scale of 1. Nothing is rounded where the scale is a power of two.
        """
        from align_cluster.backbones.adapters import lora_config

        rank, alpha = self.config.lora.rank, self.config.lora.alpha
        scales = {name: np.float32(alpha / rank if ".lora_B." in name else 1) for name in state}
        layers = {name: torch.from_numpy(value * scales[name]) for name, value in state.items()}
        settings = lora_config(self).to_dict() | {"lora_alpha": rank}
        # The same weights get the same file: a set has another order in each process.
        about = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
        path = folder / "pytorch_lora_weights.safetensors"
        with atomic(path) as file:
            self.stock(self.pipeline).save_lora_weights(
                folder,
                **{f"{self.part}_lora_layers": layers, f"{self.part}_lora_adapter_metadata": about},
                weight_name=file.name,
            )
            sort_metadata(file)
        return path


def _share(some: Sized, texts: Sized) -> str:
    """Return how many of the prompts have what the sentence goes on with."""
    if len(texts) == 1:
        return "the prompt has"
    return f"{len(some)} of {len(texts)} prompts {'has' if len(some) == 1 else 'have'}"


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Return latents [B, C, H, W] as tokens [B, H/2 W/2, 4C], for networks that do not make patches themselves."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).mT.contiguous()


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the latents [B, C, height, width] from which `pack` made the tokens."""
    return torch.nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (height // 2, width // 2)), 2)
