"""Qwen-Image (Wu et al. 2025, arXiv 2508.02324)."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from align_cluster.backbones.base import BackboneSection
from align_cluster.backbones.pipeline import JOINT_ATTENTION, PipelineBackbone, pack, unpack

POSITIONS = 4096  # of diffusers' QwenEmbedRope


class QwenImage(PipelineBackbone):
    """Predicts velocity by joint attention over image tokens and the hidden states of Qwen2.5-VL.

    A prompt's sequence is as long as the prompt has tokens. `pooled` is empty.
    """

    class Config(BackboneSection):
        """Configures Qwen-Image."""

        kind: Literal["qwen_image"] = "qwen_image"
        max_sequence_length: Annotated[int, Field(gt=0, le=1024)] = 512
        """The most tokens of an encoded prompt, the end of its chat template included; longer ones are cut. The default
        is the stock pipeline's."""

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
    native_size = 128  # 1024 pixels: the stock pipeline's default, which no part's config names
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
        """Return the factor of the video VAE, which names its downsampling steps instead of its channels."""
        return 2 ** len(self.vae_config["temperal_downsample"])

    def call(self, guidance: float) -> dict[str, Any]:
        """The stock pipeline calls the guidance `true_cfg_scale` and needs a negative prompt for it."""
        arguments = super().call(guidance) | {"max_sequence_length": self.config.max_sequence_length}
        arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
        return arguments | ({"negative_prompt": " "} if guidance > 1 else {})

    @property
    def largest_side(self) -> int:
        """The network has POSITIONS on each side of an image's middle, and the prompt's tokens follow its edge."""
        return 2 * self.patch * (POSITIONS - self.text_tokens)

    def readers(self) -> dict[str, int]:
        """The limit of an encoding counts from the prompt's first token."""
        return {"tokenizer": self.config.max_sequence_length}

    @property
    def text_tokens(self) -> int:
        """Return the configured limit, because encodings have no fixed length."""
        return self.config.max_sequence_length

    def text_settings(self) -> list:
        """The limit of the sequence length changes an encoding."""
        return [self.config.max_sequence_length]

    def embed(self, pipeline: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return Qwen2.5-VL's hidden states and an empty pooled vector."""
        length = self.config.max_sequence_length
        # The model's authors and all recipes use a blank as the negative prompt.
        sequence, _ = pipeline.encode_prompt(text or " ", self.text_device, max_sequence_length=length)
        return sequence[0], sequence.new_empty(0)

    def velocity(
        self,
        denoiser: torch.nn.Module,
        x: torch.Tensor,
        sigma: torch.Tensor,
        sequence: torch.Tensor,
        pooled: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Qwen-Image takes packed latents, sigma in [0, 1], and the shape of the image in tokens."""
        height, width = x.shape[2:]
        with self.autocast():
            output = denoiser(
                hidden_states=pack(x).to(self.dtype),
                encoder_hidden_states=sequence.to(self.dtype),
                encoder_hidden_states_mask=mask,
                timestep=sigma,
                img_shapes=[[(1, height // 2, width // 2)]] * len(x),
                return_dict=False,
            )
        return unpack(output[0].float(), height, width)

    def guide(self, v: torch.Tensor, v_null: torch.Tensor, guidance: float) -> torch.Tensor:
        """Apply classifier-free guidance, then restore the norm that each token has without guidance."""
        text = pack(v)
        guided = super().guide(text, pack(v_null), guidance)
        guided = guided * (text.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpack(guided, *v.shape[2:])

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE decodes videos, so a latent becomes a video of one frame, scaled back channel by channel."""
        config = self._vae.config
        mean, std = (latents.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
        video = (latents * std + mean)[:, :, None]  # one frame
        with self.autocast():
            return self._vae.decode(video.to(self.dtype), return_dict=False)[0][:, :, 0].float()

    @torch.no_grad()
    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """The VAE encodes videos, so an image becomes a video of one frame."""
        video = (2 * images - 1)[:, :, None].to(self.device, self.dtype)  # one frame
        with self.autocast():
            z = self._vae.encode(video).latent_dist.mode()[:, :, 0].float()
        config = self._vae.config
        mean, std = (z.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
        return (z - mean) / std
