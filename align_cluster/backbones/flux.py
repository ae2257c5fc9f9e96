"""FLUX.1-dev and FLUX.1-schnell (Black Forest Labs 2024)."""

from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from align_cluster.backbones.base import BackboneSection
from align_cluster.backbones.clip_exploration import ClipExploration
from align_cluster.backbones.pipeline import JOINT_ATTENTION, PipelineBackbone, pack, unpack
from align_cluster.types import Condition


class Flux(ClipExploration, PipelineBackbone):
    """Predicts velocity by joint attention over packed latents and T5's sequence; CLIP-L gives only `pooled`."""

    class Config(BackboneSection):
        """Configures FLUX.1.

        rollout.guidance is true classifier-free guidance, which costs a second forward pass. FLUX.1-dev needs none: it
        is told `distilled_guidance`.
        """

        kind: Literal["flux"] = "flux"
        distilled_guidance: Annotated[float, Field(ge=0)] = 3.5
        """The guidance strength that is fed to a guidance-distilled network (dev), in rollouts and updates alike,
        unless `rollout.distilled_guidance` is set. A network without that input (schnell) ignores it. Flow-GRPO and
        DanceGRPO use 3.5."""
        max_sequence_length: Annotated[int, Field(gt=0, le=512)] | None = None
        """The number of T5 tokens to which each prompt is padded or cut. null takes the stock pipeline's 512, or 256
        for schnell. A smaller one saves time and memory with short prompts."""

    family = "a FLUX.1"
    pipeline = "FluxPipeline"
    pipelines = ("FluxPipeline",)
    network = "FluxTransformer2DModel"
    texts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    equal_levels = True
    packed = True
    takes_distilled_guidance = True
    critic_blocks = ("transformer_blocks", "single_transformer_blocks")
    native_size = 128  # 1024 pixels: the stock pipeline's default, which no part's config names
    # Attention and feed-forward layers of the double blocks, attention of the single ones: Flow-GRPO's recipe.
    lora_targets = (
        *JOINT_ATTENTION,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )

    @property
    def _distilled(self) -> bool:
        """Return whether the network has an input for the strength of guidance."""
        return self.network_config.get("guidance_embeds", False)

    @property
    def _sequence_length(self) -> int:
        return self.config.max_sequence_length or (512 if self._distilled else 256)

    def call(self, guidance: float) -> dict[str, Any]:
        """True guidance needs an empty negative prompt; `guidance_scale` is the distilled strength."""
        arguments = super().call(self.config.distilled_guidance) | {"max_sequence_length": self._sequence_length}
        return arguments | ({"true_cfg_scale": guidance, "negative_prompt": ""} if guidance > 1 else {})

    def readers(self) -> dict[str, int]:
        """CLIP's part is one vector, and T5 reads as far as the settings say."""
        return {"tokenizer": self.clip_tokens, "tokenizer_2": self._sequence_length}

    @property
    def text_tokens(self) -> int:
        """Return the configured sequence length, because T5's sequence is padded to it."""
        return self._sequence_length

    def text_settings(self) -> list:
        """The sequence length changes an encoding."""
        return [self._sequence_length]

    def embed(self, pipeline: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return T5's sequence and CLIP-L's pooled embedding."""
        length = self._sequence_length
        sequence, pooled, _ = pipeline.encode_prompt(text, device=self.text_device, max_sequence_length=length)
        return sequence[0], pooled[0]

    def replaced(self, condition: Condition, hidden: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """FLUX.1 reads only CLIP-L's pooled vector, so only `pooled` changes."""
        return condition.sequence, pooled

    def velocity(
        self,
        denoiser: torch.nn.Module,
        x: torch.Tensor,
        sigma: torch.Tensor,
        sequence: torch.Tensor,
        pooled: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """FLUX.1 takes packed latents, their positions, and sigma in [0, 1], which it multiplies by 1000 itself."""
        height, width = x.shape[2:]
        strength = self.config.distilled_guidance if self.distilled_guidance is None else self.distilled_guidance
        rows, columns = (torch.arange(side // 2, device=x.device) for side in (height, width))
        with self.autocast():
            output = denoiser(
                hidden_states=pack(x).to(self.dtype),
                encoder_hidden_states=sequence.to(self.dtype),
                pooled_projections=pooled.to(self.dtype),
                timestep=sigma,
                guidance=torch.full_like(sigma, strength) if self._distilled else None,
                img_ids=torch.cartesian_prod(rows.new_zeros(1), rows, columns),  # (0, row, column) of each token
                txt_ids=rows.new_zeros(sequence.shape[1], 3),
                return_dict=False,
            )
        return unpack(output[0].float(), height, width)
