"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206), and the embedded pipeline.

The embedded pipeline is a small network of SD3's architecture.
"""

from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from align_cluster.backbones.base import BackboneSection
from align_cluster.backbones.clip_exploration import ClipExploration
from align_cluster.backbones.pipeline import JOINT_ATTENTION, PipelineBackbone
from align_cluster.types import Condition


class SD3(ClipExploration, PipelineBackbone):
    """Predicts velocity by joint attention over image tokens and two CLIP (and optionally T5) encodings."""

    class Config(BackboneSection):
        """Configures the SD3 family and the embedded pipeline, which has no T5."""

        kind: Literal["sd3"] = "sd3"
        path: str = "embedded"
        t5: bool = True
        """Whether the T5 encoder reads prompts. false saves its memory, and SD3's paper reports worse text in images
        and a slightly worse match with prompts."""
        max_sequence_length: Annotated[int, Field(ge=0, le=512)] | None = None
        """The number of T5 tokens to which each prompt is padded or cut. null takes Flow-GRPO's 128, or 0 for the
        embedded pipeline. Without T5 as many zero tokens take their place, as in the stock pipeline."""

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
    clips = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))

    @property
    def _has_t5(self) -> bool:
        return self.config.t5 and self.index.get("text_encoder_3", (None, None))[0] is not None

    def text_parts(self) -> dict[str, Any]:
        """The transformer stays on the meta device: the stock pipeline reads its widths where T5 is missing."""
        return super().text_parts() | {"transformer": self.on_meta(self.network, self.part)}

    @property
    def unread(self) -> tuple[str, ...]:
        """T5 may be left out of the pipeline's folder, and by the settings."""
        return () if self._has_t5 else ("text_encoder_3", "tokenizer_3")

    @property
    def _sequence_length(self) -> int:
        # Without T5 the stock pipeline pads with zero tokens up to this length; the embedded model never saw any.
        length = self.config.max_sequence_length
        return length if length is not None else 0 if self.config.path == "embedded" else 128

    def call(self, guidance: float) -> dict[str, Any]:
        """The stock pipeline also needs the length of T5's sequence."""
        return super().call(guidance) | {"max_sequence_length": self._sequence_length}

    @property
    def largest_side(self) -> int | None:
        """The network crops a table of positions, of which a patch takes one."""
        return self.network_config["pos_embed_max_size"] * self.patch

    def readers(self) -> dict[str, int]:
        """Both CLIPs read as far as the first, and T5 as far as the settings say."""
        clips = dict.fromkeys(("tokenizer", "tokenizer_2"), self.clip_tokens)
        return clips | ({"tokenizer_3": self._sequence_length} if self._has_t5 else {})

    @property
    def text_tokens(self) -> int:
        """T5's sequence follows CLIP's."""
        return self.clip_tokens + self._sequence_length

    def text_settings(self) -> list:
        """T5's presence and the sequence length change an encoding."""
        return [self.config.t5, self._sequence_length]

    def embed(self, pipeline: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the joint sequence of CLIP and T5, and the joint pooled embedding of both CLIPs."""
        length = self._sequence_length
        sequence, _, pooled, _ = pipeline.encode_prompt(
            text, None, None, self.text_device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return sequence[0], pooled[0]

    def replaced(self, condition: Condition, hidden: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CLIP-L has the first channels of the first rows of the sequence, and the first part of `pooled`.
        CLIP-G has the next."""
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
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """SD3 takes 1000 sigma as its timestep, untruncated."""
        with self.autocast():
            output = denoiser(
                hidden_states=x.to(self.dtype),
                encoder_hidden_states=sequence.to(self.dtype),
                pooled_projections=pooled.to(self.dtype),
                timestep=1000 * sigma,
                return_dict=False,
            )
        return output[0].float()
