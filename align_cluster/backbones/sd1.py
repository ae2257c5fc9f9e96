"""Stable Diffusion 1 and 2 (Rombach et al. 2022, arXiv 2112.10752): a UNet that predicts epsilon or v.

SD 2 at 768 pixels predicts v, the others epsilon.
"""

from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from align_cluster.backbones.base import BackboneSection
from align_cluster.backbones.clip_exploration import ClipExploration
from align_cluster.backbones.levels import ddim_levels, diffusion_levels
from align_cluster.backbones.pipeline import PipelineBackbone
from align_cluster.errors import UserError
from align_cluster.types import Condition

# Scheduler settings by name: diffusers' default, and the values that this backbone reproduces.
_KNOWN = {
    "prediction_type": ("epsilon", ("epsilon", "v_prediction")),
    "beta_schedule": ("linear", ("scaled_linear",)),
    "trained_betas": (None, (None,)),
    "rescale_betas_zero_snr": (False, (False,)),
    "timestep_spacing": ("leading", ("leading",)),
    "thresholding": (False, (False,)),
}


class SD1(ClipExploration, PipelineBackbone):
    """Predicts epsilon or v with a UNet that attends to one CLIP text encoding.

    Images are drawn with DDIM, whatever scheduler the pipeline names (Stable Diffusion 1.4: PNDM). The scheduler's
    settings say how the network was trained, and are read as `DDIMScheduler.from_config` reads them. As in the stock
    pipeline, `steps_offset` is 1 and x0 is not clipped. The last noise level is that of timestep 0.
    """

    class Config(BackboneSection):
        """Configures Stable Diffusion 1 and 2."""

        kind: Literal["sd1"] = "sd1"

    flow = False
    layer = None
    patch = 1  # the UNet takes odd sizes too
    family = "a Stable Diffusion 1 or 2"
    pipeline = "StableDiffusionPipeline"
    pipelines = ("StableDiffusionPipeline",)
    network = "UNet2DConditionModel"
    part = "unet"
    texts = ("text_encoder", "tokenizer")
    # All attentions, as in diffusers' train_text_to_image_lora.py and DDPO.
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """Return the scheduler's settings. Raises UserError for a setting that the noise levels do not reproduce."""
        config = self.part_config("DDIMScheduler", "scheduler")
        for name, (default, known) in _KNOWN.items():
            value = config.get(name, default)
            if value not in known:
                raise UserError(
                    f"backbone.path: the scheduler of {self.config.path!r} has {name} {value!s:.30}, and "
                    f"backbone.kind {self.config.kind} knows {' and '.join(map(str, known))} only; give another model"
                )
        return config

    @property
    def prediction(self) -> Literal["epsilon", "v"]:
        """The scheduler's settings say whether the network predicts epsilon or v."""
        return "v" if self.scheduler_config.get("prediction_type") == "v_prediction" else "epsilon"

    @property
    def _training(self) -> dict[str, Any]:
        """Return the number of training timesteps and the range of betas."""
        defaults = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02}
        steps, start, end = (self.scheduler_config.get(name, value) for name, value in defaults.items())
        return {"train_steps": steps, "beta_start": start, "beta_end": end}

    def sigmas(self, steps: int) -> np.ndarray:
        """Return DDIM's levels with leading spacing."""
        return ddim_levels(steps, **self._training)

    @cached_property
    def _levels(self) -> torch.Tensor:
        """Return the noise levels of all training timesteps, rounded as `Step.level` rounds those of a rollout."""
        return torch.tensor(diffusion_levels(**self._training), dtype=torch.float32, device=self.device)

    def timesteps(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the training timesteps int64 [B] that have the noise levels sigma [B]."""
        return (self._levels - sigma[:, None]).abs().argmin(1)

    def embed(self, pipeline: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return CLIP's output and an empty pooled vector."""
        sequence, _ = pipeline.encode_prompt(text, self.text_device, 1, do_classifier_free_guidance=False)
        return sequence[0], sequence.new_empty(0)

    def replaced(self, condition: Condition, hidden: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The UNet reads nothing but CLIP's output, so the whole sequence changes."""
        return hidden, condition.pooled

    def taps(self, denoiser: torch.nn.Module) -> list[tuple[torch.nn.Module, int]]:
        """The critic reads the middle of the U and a block on the way up."""
        up = denoiser.up_blocks[len(denoiser.up_blocks) // 2]
        return [(denoiser.mid_block, denoiser.config.block_out_channels[-1]), (up, up.resnets[-1].out_channels)]

    def tokens(self, output: torch.Tensor) -> torch.Tensor:
        """A UNet block returns an image [B, D, H, W], and each of its pixels is a token."""
        return output.flatten(2).transpose(1, 2)

    def velocity(
        self,
        denoiser: torch.nn.Module,
        x: torch.Tensor,
        sigma: torch.Tensor,
        sequence: torch.Tensor,
        pooled: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The UNet takes the integer timestep that has the noise level sigma."""
        with self.autocast():
            output = denoiser(
                x.to(self.dtype),
                self.timesteps(sigma),
                encoder_hidden_states=sequence.to(self.dtype),
                return_dict=False,
            )
        return output[0].float()
