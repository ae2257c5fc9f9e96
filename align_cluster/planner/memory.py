"""Sizes of a run's networks, and the bytes and FLOPs of what its samplers and learners compute with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.base import Algorithm, Batch, Policy, RecordedSteps
from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.critic import Critic
from align_cluster.backbones.pipeline import PipelineBackbone
from align_cluster.config.plan import Plan
from align_cluster.config.run import RunConfig
from align_cluster.learner.policy import LearnerPolicy
from align_cluster.planner.count import Counter, Usage, counting
from align_cluster.planner.layers import Layers
from align_cluster.planner.meta_backbone import meta_backbone, text_parameters
from align_cluster.rollouts.guidance import TextBatch, guided_velocity
from align_cluster.rollouts.steps import STEPS, Step

NOTHING = Usage(0, 0)
Inputs = tuple[torch.Tensor, torch.Tensor, TextBatch]


@dataclass(frozen=True)
class LearnerUsage:
    """Holds what a learner's computations take with their backward passes, with or without gradient checkpointing.

    update          the loss of one micro-batch at the noise levels that are folded into one pass
    critic          one training batch of the critic
    reward_decode   the decoding of images that rewards send gradients to: of one pass, or with checkpointing of one
                    image
    """

    update: Usage = NOTHING
    critic: Usage = NOTHING
    reward_decode: Usage = NOTHING


@dataclass(frozen=True)
class Sizes:
    """Holds what a run's networks and computations take, in bytes unless said otherwise.

    parameters       number of parameters of each part, and of one adapter as "lora"
    itemsize         of one weight of the base
    denoiser, vae    their weights and buffers
    text             weights of all text encoders
    adapter          one adapter in fp32
    adapters         number of adapters that the learner keeps
    draw, decode     one (guided) prediction for a chunk, and the decoding of its images
    plain            the learner's computations without gradient checkpointing, where they were counted
    checkpointed     the same with gradient checkpointing
    values           one batch of states that the critic judges
    critic_weights   what the critic adds to the base
    critic_trained   the critic's trainable weights in fp32
    """

    parameters: dict[str, int]
    itemsize: int
    denoiser: int
    vae: int
    text: int
    adapter: int
    adapters: int
    draw: Usage
    decode: Usage
    plain: LearnerUsage = LearnerUsage()
    checkpointed: LearnerUsage = LearnerUsage()
    values: Usage = NOTHING
    critic_weights: int = 0
    critic_trained: int = 0

    def learner(self, config: RunConfig) -> LearnerUsage:
        """Return what the learner's computations take with the gradient checkpointing of `config`."""
        return self.checkpointed if config.learner.gradient_checkpointing else self.plain


def measure(config: RunConfig, plan: Plan, device: str, alternatives: bool = True) -> Sizes:
    """Count a run on `device`, cpu or cuda. This takes seconds and little memory, whatever the model's size.

    Without `alternatives` the learner is counted with the gradient checkpointing of `config` alone.
    """
    networks = Networks(config, device)
    sizes = networks.sizes()
    with counting(device) as counter:
        return Sizes(**sizes, **networks.usage(counter, plan, alternatives))


class Networks:
    """A run's networks without values, and the computations of its samplers and learners.

    A computation takes `inputs`: latents x [B, C, H, W], noise levels sigma [B] and the text of B images.
    """

    def __init__(self, config: RunConfig, device: str) -> None:
        """Build the networks as they are on `device`, cpu or cuda."""
        self.config, self.algorithm = config, ALGORITHMS[config.algorithm.kind](config.algorithm)
        self.backbone = meta_backbone(config.backbone, device)
        self.text, self.vae = text_parameters(self.backbone), self.backbone._vae
        denoiser, critic, rewards = self.backbone.load_denoiser(), self.algorithm.critic, len(config.trained)
        self.base = _tensors(denoiser)
        # A critic reads features of certain layers, which must stay where they are.
        self.layers = Layers(torch.nn.Module() if critic else denoiser)
        self.denoiser = add_adapters(self.backbone, denoiser, self.algorithm.adapters)
        self.critic = Critic(self.backbone, self.denoiser, rewards, critic) if critic else None
        self.predictions = predictions(config, self.algorithm, self.backbone)

    def sizes(self) -> dict[str, Any]:
        """Return the fields of `Sizes` that describe weights."""
        vae = _tensors(self.vae)
        [adapter] = self.layers.whole(lambda: [_parameters(adapter_parameters(self.denoiser, "default"))])
        sizes = {
            "parameters": {
                self.backbone.part: _parameters(self.base),
                "vae": _parameters(vae),
                **self.text,
                "lora": adapter,
            },
            "itemsize": self.backbone.dtype.itemsize,
            "denoiser": _bytes(self.base),
            "vae": _bytes(vae),
            "text": sum(self.text.values()) * self.backbone.dtype.itemsize,
            "adapter": 4 * adapter,
            "adapters": len(self.algorithm.adapters),
        }
        if self.critic:
            own_network = self.critic.network is not self.denoiser
            copy = _tensors(self.critic.network, without="lora_") if own_network else {}
            decoder = vae if self.critic.encoder else {}
            sizes["critic_weights"] = sum(map(_bytes, (_tensors(self.critic), copy, decoder)))
            sizes["critic_trained"] = 4 * sum(parameter.numel() for parameter in self.critic.trainable)
        return sizes

    def usage(self, counter: Counter, plan: Plan, alternatives: bool) -> dict[str, Any]:
        """Run the computations and return the fields of `Sizes` that describe them. Checkpointing stays on at the end.

        An update is counted at the noise levels of one pass: the losses go through the passes one after the other.
        """
        for module in (self.denoiser, self.vae, *([self.critic, self.critic.network] if self.critic else ())):
            counter.adopt(module)

        def taken(compute: Callable[..., object], size: int) -> Usage:
            inputs = self.inputs(size)
            return counter.measure(lambda: compute(*inputs))

        def through_layers(compute: Callable[..., object], size: int) -> Usage:
            return Usage(*self.layers.whole(lambda: taken(compute, size)))

        def learner(decoded: int) -> LearnerUsage:
            return LearnerUsage(
                update=through_layers(self.update, plan.rows_per_pass),
                critic=taken(self.train_critic, self.config.algorithm.critic_batch) if self.critic else NOTHING,
                reward_decode=taken(self.reward_decode, decoded) if self.algorithm.reward_gradient else NOTHING,
            )

        draw, decode = through_layers(self.draw, plan.chunk), taken(self.decode, plan.chunk)
        values = taken(self.values, self.config.algorithm.critic_batch) if self.critic else NOTHING
        found, checkpointing = (
            {"draw": draw, "decode": decode, "values": values},
            self.config.learner.gradient_checkpointing,
        )
        if alternatives or not checkpointing:
            found["plain"] = learner(plan.rows_per_pass)
        if alternatives or checkpointing:
            self.enable_gradient_checkpointing()
            found["checkpointed"] = learner(1)
        return found

    def inputs(self, size: int) -> Inputs:
        """Make the inputs of one computation for `size` images."""
        tokens, width, pooled = self.backbone.text_shape
        text = (torch.empty(size, tokens, width), torch.empty(size, pooled))
        null = [torch.empty_like(part) for part in text] if self.config.rollout.guidance > 1 else []
        return torch.empty(size, *self.backbone.latent_shape), torch.empty(size), TextBatch(*text, None, *null)

    @torch.no_grad()
    def draw(self, x: torch.Tensor, sigma: torch.Tensor, text: TextBatch) -> torch.Tensor:
        """Predict as a sampler does at each denoising step."""
        return guided_velocity(self.backbone, self.denoiser, x, sigma, text, self.config.rollout.guidance)

    @torch.no_grad()
    def decode(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        """Decode images as a sampler does."""
        return self.backbone.pixels(x)

    def update(self, x: torch.Tensor, sigma: torch.Tensor, text: TextBatch) -> None:
        """Make every prediction that the loss asks for at one noise level, and go back through them."""
        guidance, both = self.config.rollout.guidance, self.config.learner.guidance_gradient == "both"
        policy = LearnerPolicy(
            backbone=self.backbone,
            network=self.denoiser,
            denoiser=self.denoiser,
            step=None,
            text=text,
            guidance=guidance,
            null_gradient=both,
        )
        outputs = [policy.velocity(x, sigma, adapter) for adapter in self.predictions]
        torch.autograd.backward(sum(output.square().mean() for output in outputs))
        self.denoiser.zero_grad()

    @torch.no_grad()
    def values(self, x: torch.Tensor, sigma: torch.Tensor, text: TextBatch) -> torch.Tensor:
        """Judge states by the critic."""
        return self.critic(x, sigma, text.sequence, text.pooled)

    def train_critic(self, x: torch.Tensor, sigma: torch.Tensor, text: TextBatch) -> None:
        """Judge states by the critic, and go back through it."""
        with self.critic.active():
            torch.autograd.backward(self.critic(x, sigma, text.sequence, text.pooled).square().mean())
        self.critic.zero_grad()

    def reward_decode(self, x: torch.Tensor, *_: object) -> None:
        """Decode images, and go back to their latents as the gradient of a reward does."""
        torch.autograd.backward(self.backbone.pixels(x.requires_grad_()).square().mean())
        x.grad = None

    def enable_gradient_checkpointing(self) -> None:
        """Let the denoiser, the critic's network and the VAE's decoder compute activations again."""
        self.denoiser.enable_gradient_checkpointing()
        if self.critic:
            self.critic.network.enable_gradient_checkpointing()
        self.backbone.checkpoint_decoder()


def _tensors(module: torch.nn.Module, without: str = "\n") -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name; those that are shared come once."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor for name, tensor in named.items() if without not in name}


def _parameters(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, torch.nn.Parameter))


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class RecordingPolicy(Policy):
    """A policy that predicts zeros and records under which adapters a loss asks for predictions."""

    def __init__(self, step: Step) -> None:
        """Take the rollout's step kind, which losses read."""
        self.step, self.adapters = step, []

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, adapter: str | None = "default") -> torch.Tensor:
        """Record the adapter and return zeros like x; only the default adapter's carry a gradient."""
        self.adapters.append(adapter)
        return torch.zeros_like(x, requires_grad=adapter == "default")

    def rewards(self, latents: torch.Tensor, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return made-up rewards [b, J] with a gradient to the latents."""
        return latents.flatten(1).sum(1, keepdim=True).expand(-1, len(texts[0]))


def predictions(config: RunConfig, algorithm: Algorithm, backbone: PipelineBackbone) -> list[str | None]:
    """Return the adapters under which a loss asks for a prediction at each noise level of a sample, in its order.

    None stands for the bare base.
    """
    kind, steps = config.step_kind, config.rollout.steps
    sigmas = backbone.sigmas(steps)
    policy = RecordingPolicy(STEPS[kind.kind](kind, sigmas, backbone.prediction))
    one, flat = torch.zeros(1, 1, 2, 2), torch.zeros(1, steps)
    path, advantages = one[:, None].expand(1, steps, 1, 2, 2), flat if algorithm.critic else flat[:, 0]
    indices = torch.arange(steps)[None]
    recorded = RecordedSteps(indices=indices, before=path, after=path, log_probs=flat, means=path)
    streams = {"generators": lambda *_, **__: [torch.Generator()], "prompts": ("",), "noises": (0,)}
    algorithm.loss(
        policy,
        Batch(passes=(0,), advantages=advantages, x0=one, sigmas=sigmas, recorded=recorded, **streams),
    )
    return policy.adapters
