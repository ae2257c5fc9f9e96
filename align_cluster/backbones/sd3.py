"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206), and the embedded pipeline, which has their
architecture."""

from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from align_cluster.backbones.base import BackboneSection
from align_cluster.backbones.pipeline import JOINT_ATTENTION, ClipExploration, PipelineBackbone
from align_cluster.types import Condition


class SD3(ClipExploration, PipelineBackbone):
    """Velocity network with joint attention over image tokens and two CLIP (and optionally T5) text encodings."""

    class Config(BackboneSection):
        """Settings of the SD3 family. `t5: false` leaves the T5 encoder out, as SD3 allows.

        `max_sequence_length: null` is 128, or 0 for the embedded pipeline, which has no T5.
        """

        kind: Literal["sd3"] = "sd3"
        path: str = "embedded"
        t5: bool = True
        max_sequence_length: Annotated[int, Field(ge=0, le=512)] | None = None

    family = "an SD3"
    pipeline = "StableDiffusion3Pipeline"
    pipelines = ("StableDiffusion3Pipeline",)
    network = "SD3Transformer2DModel"
    blocks = ("JointTransformerBlock",)
    texts = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    # The eight attention projections of the Flow-GRPO and DiffusionNFT recipes.
    lora_targets = JOINT_ATTENTION
    critic_blocks = ("transformer_blocks",)
    tiny_last_level = True

    @property
    def _has_t5(self) -> bool:
        return self.config.t5 and self.index.get("text_encoder_3", (None, None))[0] is not None

    def text_parts(self) -> dict[str, Any]:
        """The transformer is a shell on the meta device: where T5 is missing, the stock pipeline reads its widths."""
        without_t5 = {} if self._has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
        return super().text_parts() | {"transformer": self.hollow(self.network, self.part)} | without_t5

    @property
    def _sequence_length(self) -> int:
        # Without T5 the stock pipeline pads with zero tokens up to this length; the embedded model never saw any.
        length = self.config.max_sequence_length
        return length if length is not None else 0 if self.config.path == "embedded" else 128

    def call(self, guidance: float) -> dict[str, Any]:
        return super().call(guidance) | {"max_sequence_length": self._sequence_length}

    @property
    def text_tokens(self) -> int:
        return super().text_tokens + self._sequence_length

    def text_settings(self) -> list:
        return [self.config.t5, self._sequence_length]

    def embed(self, pipeline: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        length = self._sequence_length
        sequence, _, pooled, _ = pipeline.encode_prompt(
            text, None, None, self.text_device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return sequence[0], pooled[0]

    def replaced(self, condition: Condition, hidden: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """SD3 lays CLIP-L first: in the first channels of the first rows, and in the first part of `pooled`."""
        sequence, whole = condition.sequence.copy(), condition.pooled.copy()
        sequence[: hidden.shape[0], : hidden.shape[1]] = hidden
        whole[: len(pooled)] = pooled
        return sequence, whole

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
