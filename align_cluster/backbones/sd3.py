"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206), and the embedded pipeline, which has their
architecture."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from align_cluster.backbones.base import Backbone, BackboneSection
from align_cluster.conditions.perturb import E2po, learn
from align_cluster.embedded import pipeline_path
from align_cluster.rollouts.schedule import sd3_sigmas
from align_cluster.types import Condition, Perturbation, UserError


class SD3(Backbone):
    """Velocity network with joint attention over image tokens and two CLIP (and optionally T5) text encodings."""

    class Config(BackboneSection):
        """Settings of the SD3 family. `t5: false` leaves the T5 encoder out, as SD3 allows.

        `max_sequence_length: null` is 128, or 0 for the embedded pipeline, which has no T5.
        """

        kind: Literal["sd3"] = "sd3"
        path: str = "embedded"
        t5: bool = True
        max_sequence_length: Annotated[int, Field(ge=0, le=512)] | None = None

    prediction = "flow"
    explorable = True
    # The eight attention projections of the Flow-GRPO and DiffusionNFT recipes.
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    @property
    def source(self) -> str:
        return str(pipeline_path()) if self.config.path == "embedded" else self.config.path

    @contextmanager
    def _reading(self, part: str) -> Iterator[None]:
        """Turns a part that cannot be read into one sentence for the user."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"backbone.path: {self.config.path!r} has no readable {part!r} part: give 'embedded', a diffusers "
                f"folder of an SD3 pipeline, or a hub id that this machine can reach ({str(error).splitlines()[0]})"
            ) from error

    def _part_config(self, cls: type, part: str) -> dict:
        with self._reading(part):
            return cls.load_config(self.source, subfolder=part)

    @cached_property
    def _transformer_config(self) -> dict:
        from diffusers import SD3Transformer2DModel

        return self._part_config(SD3Transformer2DModel, "transformer")

    @cached_property
    def _vae_config(self) -> dict:
        from diffusers import AutoencoderKL

        return self._part_config(AutoencoderKL, "vae")

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = 2 ** (len(self._vae_config["block_out_channels"]) - 1)
        native = self._transformer_config["sample_size"]
        height, width = (size // factor if size else native for size in (self.config.height, self.config.width))
        return self._transformer_config["in_channels"], height, width

    def sigmas(self, steps: int) -> np.ndarray:
        from diffusers import FlowMatchEulerDiscreteScheduler

        shift = self._part_config(FlowMatchEulerDiscreteScheduler, "scheduler").get("shift", 1.0)
        return sd3_sigmas(steps, shift)

    def load_denoiser(self) -> torch.nn.Module:
        from diffusers import SD3Transformer2DModel

        with self._reading("transformer"):
            model = SD3Transformer2DModel.from_pretrained(self.source, subfolder="transformer", dtype=self.dtype)
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def _text(self) -> object:
        """The stock pipeline with text encoders only; its transformer is a shell on the meta device (its widths are
        read)."""
        from accelerate import init_empty_weights
        from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

        with init_empty_weights():
            shell = SD3Transformer2DModel.from_config(self._transformer_config)
        index = StableDiffusion3Pipeline.load_config(self.source)
        has_t5 = self.config.t5 and index.get("text_encoder_3", (None, None))[0] is not None
        without_t5 = {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
        with self._reading("text_encoder"):
            return StableDiffusion3Pipeline.from_pretrained(
                self.source, transformer=shell, vae=None, dtype=self.dtype, **without_t5
            )

    @torch.no_grad()
    def encode(self, texts: list[str]) -> list[Condition]:
        pipeline = self._text
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(pipeline, name) is not None:
                getattr(pipeline, name).to(self.device)
        length = self._sequence_length
        conditions = []
        for text in texts:
            sequence, _, pooled, _ = pipeline.encode_prompt(
                text, None, None, self.device, do_classifier_free_guidance=False, max_sequence_length=length
            )
            arrays = (sequence[0].float().cpu().numpy(), pooled[0].float().cpu().numpy())
            conditions.append(Condition(self.condition_key(text), *arrays))
        return conditions

    def perturb(self, texts: list[str], config: E2po, seed: int) -> list[Perturbation]:
        encoder = self._text.text_encoder.to(self.device).requires_grad_(False)
        keys = [self.perturbation_key(text, config, seed) for text in texts]
        return learn(encoder, self._text.tokenizer, texts, keys, config, seed)

    def insert(self, condition: Condition, perturbation: Perturbation, variant: int) -> Condition:
        """SD3 lays CLIP-L first: in the first channels of the first rows, and in the first part of `pooled`."""
        if variant == 0:
            return condition
        hidden, vector = perturbation.hidden[variant - 1], perturbation.pooled[variant - 1]
        sequence, pooled = condition.sequence.copy(), condition.pooled.copy()
        sequence[: hidden.shape[0], : hidden.shape[1]] = hidden
        pooled[: len(vector)] = vector
        return Condition(f"{condition.key}/{perturbation.key}/{variant}", sequence, pooled)

    def _identity(self, *parts: str) -> list:
        """Which files these parts are: name, size and time, or the hub id."""
        files = sorted(path for part in parts for path in Path(self.source).glob(f"{part}/*"))
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files] or [self.source]

    @cached_property
    def _text_identity(self) -> list:
        return self._identity("text_encoder*", "tokenizer*")

    @cached_property
    def _clip_identity(self) -> list:
        return self._identity("text_encoder", "tokenizer")

    @property
    def _sequence_length(self) -> int:
        # Without T5 the stock pipeline pads with zero tokens up to this length; the embedded model never saw any.
        length = self.config.max_sequence_length
        return length if length is not None else 0 if self.config.path == "embedded" else 128

    def condition_key(self, text: str) -> str:
        """Content address of an encoding: everything that it depends on."""
        return _address(self._text_identity, self.config.t5, self._sequence_length, str(self.dtype), text)

    def perturbation_key(self, text: str, config: E2po, seed: int) -> str:
        # rho is phase 2's: it weighs perturbations that are there already.
        return _address(self._clip_identity, str(self.dtype), config.model_dump(exclude={"rho"}), seed, text)

    def velocity(
        self,
        denoiser: torch.nn.Module,
        x: torch.Tensor,
        sigma: torch.Tensor,
        sequence: torch.Tensor,
        pooled: torch.Tensor,
    ) -> torch.Tensor:
        with self.autocast():
            output = denoiser(
                hidden_states=x.to(self.dtype),
                encoder_hidden_states=sequence.to(self.dtype),
                pooled_projections=pooled.to(self.dtype),
                timestep=1000 * sigma,
                return_dict=False,
            )
        return output[0].float()

    @cached_property
    def _vae(self) -> torch.nn.Module:
        from diffusers import AutoencoderKL

        with self._reading("vae"):
            vae = AutoencoderKL.from_pretrained(self.source, subfolder="vae", dtype=self.dtype)
        return vae.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        config = self._vae.config
        z = latents.to(self.device) / config.scaling_factor + (config.shift_factor or 0.0)
        with self.autocast():
            pixels = self._vae.decode(z.to(self.dtype, memory_format=torch.channels_last)).sample.float()
        images = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def save_lora(self, state: dict[str, np.ndarray], folder: Path) -> Path:
        from diffusers import StableDiffusion3Pipeline

        from align_cluster.backbones.adapters import lora_config

        metadata = lora_config(self).to_dict()
        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers={name: torch.from_numpy(value.copy()) for name, value in state.items()},
            transformer_lora_adapter_metadata=metadata,
        )
        return folder / "pytorch_lora_weights.safetensors"


def _address(*facts: object) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
