"""Qwen-Image (Wu et al. 2025, arXiv 2508.02324)."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from align_cluster.backbones.base import BackboneSection
from align_cluster.backbones.pipeline import JOINT_ATTENTION, PipelineBackbone, pack, unpack


class QwenImage(PipelineBackbone):
    """Velocity network with joint attention over image tokens and the hidden states of Qwen2.5-VL, of which a prompt
    has as many as it has tokens. `pooled` is empty."""

    class Config(BackboneSection):
        """Settings of Qwen-Image. `max_sequence_length` cuts encodings off, the prompt's template included."""

        kind: Literal["qwen_image"] = "qwen_image"
        max_sequence_length: Annotated[int, Field(gt=0, le=1024)] = 512

    family = "a Qwen-Image"
    pipeline = "QwenImagePipeline"
    pipelines = ("QwenImagePipeline",)
    network = "QwenImageTransformer2DModel"
    vae = "AutoencoderKLQwenImage"
    vae_layout = torch.preserve_format  # its convolutions are 3D
    texts = ("text_encoder", "tokenizer")
    equal_levels = True
    packed = True
    critic_blocks = ("transformer_blocks",)
    native_size = 128  # 1024 pixels: the stock pipeline's choice, which no part's config names
    # Attention and feed-forward layers of both streams, as in the Flow-GRPO and verl-omni recipes.
    lora_targets = (
        *JOINT_ATTENTION,
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )

    @property
    def vae_factor(self) -> int:
        return 2 ** len(self.vae_config["temperal_downsample"])

    def call(self, guidance: float) -> dict[str, Any]:
        arguments = super().call(guidance) | {"max_sequence_length": self.config.max_sequence_length}
        arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
        return arguments | ({"negative_prompt": " "} if guidance > 1 else {})

    @property
    def text_tokens(self) -> int:
        return self.config.max_sequence_length

    def text_settings(self) -> list:
        return [self.config.max_sequence_length]

    def embed(self, pipeline: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.config.max_sequence_length
        # A blank is what the model's authors and all recipes guide away from.
        sequence, _ = pipeline.encode_prompt(text or " ", self.text_device, max_sequence_length=length)
        return sequence[0], sequence.new_empty(0)

    def velocity(
        self,
        denoiser: torch.nn.Module,
        x: torch.Tensor,
        sigma: torch.Tensor,
        sequence: torch.Tensor,
        pooled: torch.Tensor,
    ) -> torch.Tensor:
        height, width = x.shape[2:]
        with self.autocast():
            output = denoiser(
                hidden_states=pack(x).to(self.dtype),
                encoder_hidden_states=sequence.to(self.dtype),  # without padding, hence without a mask
                timestep=sigma,
                img_shapes=[[(1, height // 2, width // 2)]] * len(x),
                return_dict=False,
            )
        return unpack(output[0].float(), height, width)

    def guide(self, v: torch.Tensor, v_null: torch.Tensor, guidance: float) -> torch.Tensor:
        """Classifier-free guidance that leaves each token the length that it has without guidance."""
        text = pack(v)
        guided = super().guide(text, pack(v_null), guidance)
        guided = guided * (text.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpack(guided, *v.shape[2:])

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        config = self._vae.config
        mean, std = (latents.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
        video = (latents * std + mean)[:, :, None]  # of one frame
        with self.autocast():
            return self._vae.decode(video.to(self.dtype), return_dict=False)[0][:, :, 0].float()

    @torch.no_grad()
    def latents(self, images: torch.Tensor) -> torch.Tensor:
        video = (2 * images - 1)[:, :, None].to(self.device, self.dtype)  # of one frame
        with self.autocast():
            z = self._vae.encode(video).latent_dist.mode()[:, :, 0].float()
        config = self._vae.config
        mean, std = (z.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
        return (z - mean) / std
