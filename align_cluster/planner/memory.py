"""Bytes and FLOPs of a run's samplers and learners, counted on its own networks."""

from dataclasses import dataclass

import torch

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.base import Algorithm, Batch, Policy, RecordedSteps
from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.critic import Critic
from align_cluster.backbones.pipeline import PipelineBackbone
from align_cluster.config.plan import Plan
from align_cluster.config.run import RunConfig
from align_cluster.learner.policy import LearnerPolicy
from align_cluster.planner.count import Usage, counting
from align_cluster.planner.meta_backbone import shell, text_encoders
from align_cluster.planner.rewards import models
from align_cluster.rollouts.guidance import TextBatch, guided_velocity
from align_cluster.rollouts.steps import STEPS, Step

GATHERED = 10**9  # parameters that DeepSpeed's stage 3 keeps whole at a time (stage3_max_live_parameters)


@dataclass(frozen=True)
class Sizes:
    """What a run's model takes: numbers of parameters, bytes of its parts, and what one batch of each kind uses.

    `text` are the text encoders, `adapter` is one adapter in fp32, of which the learner keeps `adapters`. `draw` is one
    (guided) prediction for a chunk, `decode` makes its images; `update` is all that the loss asks of one micro-batch at
    one noise level, with its backward, and `checkpointed` the same with gradient checkpointing. `values` is what a
    critic says of the states that it reads at once, `critic` its training on them, `critic_checkpointed` likewise;
    `critic_weights` and `critic_trained` are bytes of what it adds. Where the learner follows rewards' gradients,
    `judge` is decoding a micro-batch with its backward, `frugal` decoding one image with the VAE's blocks computed
    again, and `rewards` and `seen` are bytes of the rewards' weights and of what they keep of one image.
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
    update: Usage
    checkpointed: Usage
    values: Usage = Usage(0, 0)
    critic: Usage = Usage(0, 0)
    critic_checkpointed: Usage = Usage(0, 0)
    critic_weights: int = 0
    critic_trained: int = 0
    judge: Usage = Usage(0, 0)
    frugal: Usage = Usage(0, 0)
    rewards: float = 0
    seen: float = 0


@dataclass(frozen=True)
class Role:
    """Bytes of one worker. `optimizer` holds gradients and DeepSpeed's buffers, too."""

    weights: float
    lora: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.lora + self.optimizer + self.activations


def measure(config: RunConfig, plan: Plan, device: str) -> Sizes:
    """Count a run on `device`, cpu or cuda. Takes seconds and little memory, whatever the model's size."""
    algorithm = ALGORITHMS[config.algorithm.kind](config.algorithm)
    backbone = shell(config.backbone, device)
    encoders, vae = text_encoders(backbone), backbone._vae
    denoiser = add_adapters(backbone, backbone.load_denoiser(), algorithm.adapters)
    parts = {backbone.part: _tensors(denoiser, "lora_"), "vae": _tensors(vae)}
    parts |= {name: _tensors(encoder) for name, encoder in encoders.items()}
    adapter = sum(parameter.numel() for parameter in adapter_parameters(denoiser, "default").values())
    critic = Critic(backbone, denoiser, len(config.trained), algorithm.critic) if algorithm.critic else None
    asked = predictions(config, algorithm, backbone)
    guidance, both = config.rollout.guidance, config.learner.guidance_gradient == "both"
    with counting(device) as counter:
        for module in (denoiser, vae, *([critic.head, critic.network] if critic else ())):
            counter.adopt(module)

        def batch(size: int) -> tuple[torch.Tensor, torch.Tensor, TextBatch]:
            tokens, width, pooled = backbone.text_shape
            text = (torch.empty(size, tokens, width), torch.empty(size, pooled))
            null = [torch.empty_like(part) for part in text] if guidance > 1 else []
            return torch.empty(size, *backbone.latent_shape), torch.empty(size), TextBatch(*text, *null)

        @torch.no_grad()
        def draw() -> torch.Tensor:
            return guided_velocity(backbone, denoiser, x, sigma, text, guidance)

        @torch.no_grad()
        def decode() -> torch.Tensor:
            return backbone.pixels(x)

        def update() -> None:
            policy = LearnerPolicy(
                backbone=backbone,
                network=denoiser,
                denoiser=denoiser,
                step=None,
                text=text,
                guidance=guidance,
                null_gradient=both,
            )
            outputs = [policy.velocity(x, sigma, name) for name in asked]
            torch.autograd.backward(sum(output.square().mean() for output in outputs))
            denoiser.zero_grad()

        @torch.no_grad()
        def appraise() -> torch.Tensor:
            return critic(*states)

        def learn() -> None:
            with critic.active():
                torch.autograd.backward(critic(*states).square().mean())
            critic.zero_grad()

        x, sigma, text = batch(plan.chunk)
        used = {"draw": counter.measure(draw), "decode": counter.measure(decode)}
        x, sigma, text = batch(plan.critic_batch)
        states = (x, sigma, text.sequence, text.pooled)
        x, sigma, text = batch(plan.micro_batch)
        used["update"] = counter.measure(update)
        if critic:
            copy = _tensors(critic.network, "lora_") if critic.network is not denoiser else {}
            used |= {"values": counter.measure(appraise), "critic": counter.measure(learn)}
            used["critic_trained"] = 4 * sum(parameter.numel() for parameter in critic.trainable)
            used["critic_weights"] = _bytes(_tensors(critic.head)) + _bytes(copy)
        denoiser.enable_gradient_checkpointing()
        used["checkpointed"] = counter.measure(update)
        if critic:
            critic.network.enable_gradient_checkpointing()
            used["critic_checkpointed"] = counter.measure(learn)
        if algorithm.reward_gradient:

            def decoded() -> None:
                torch.autograd.backward(backbone.pixels(x.requires_grad_()).square().mean())
                x.grad = None

            used["judge"] = counter.measure(decoded)
            x, _, _ = batch(1)
            backbone.checkpoint_decoder()
            used["frugal"] = counter.measure(decoded)
            known = [model for name in config.trained for model in models(config.rewards[name]) if model]
            used["rewards"] = 4 * sum(model.parameters for model in known)
            used["seen"] = sum(model.activations or 0 for model in known)
    return Sizes(
        parameters={name: _parameters(part) for name, part in parts.items()} | {"lora": adapter},
        itemsize=backbone.dtype.itemsize,
        denoiser=_bytes(parts[backbone.part]),
        vae=_bytes(parts["vae"]),
        text=sum(_parameters(parts[name]) for name in encoders) * backbone.dtype.itemsize,
        adapter=4 * adapter,
        adapters=len(algorithm.adapters),
        **used,
    )


def _tensors(module: torch.nn.Module, without: str = "\n") -> dict[str, torch.Tensor]:
    """Parameters and buffers; those that are shared, once."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor for name, tensor in named.items() if without not in name}


def _parameters(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, torch.nn.Parameter))


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Tally(Policy):
    """A policy that predicts nothing and remembers which adapters it was asked for."""

    def __init__(self, step: Step) -> None:
        self.step, self.adapters = step, []

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, adapter: str | None = "default") -> torch.Tensor:
        self.adapters.append(adapter)
        return torch.zeros_like(x, requires_grad=adapter == "default")

    def rewards(self, latents: torch.Tensor, texts: list[str]) -> torch.Tensor:
        return latents.flatten(1).sum(1, keepdim=True).expand(-1, len(texts))


def predictions(config: RunConfig, algorithm: Algorithm, backbone: PipelineBackbone) -> list[str | None]:
    """The adapters under which a loss asks for a prediction of each sample and noise level, in its order."""
    kind, steps = config.step_kind, config.rollout.steps
    sigmas = backbone.sigmas(steps)
    policy = Tally(STEPS[kind.kind](kind, sigmas, backbone.prediction))
    one, flat = torch.zeros(1, 1, 2, 2), torch.zeros(1, steps)
    path, advantages = one[:, None].expand(1, steps, 1, 2, 2), flat if algorithm.critic else flat[:, 0]
    indices = torch.arange(steps)[None]
    recorded = RecordedSteps(indices=indices, before=path, after=path, log_probs=flat, means=path)
    streams = {"generators": lambda _: [torch.Generator()], "noises": (0,)}
    algorithm.loss(
        policy,
        Batch(inner_pass=0, advantages=advantages, x0=one, sigmas=sigmas, recorded=recorded, **streams),
    )
    return policy.adapters


def sampler(config: RunConfig, plan: Plan, sizes: Sizes) -> Role:
    """A sampler with the settings of `config`, which may have another chunk than `sizes` was counted with."""
    chunk = config.rollout.chunk or config.rollout.group_size
    text = sizes.text if config.backbone.text == "keep" else 0
    activations = max(sizes.draw.bytes, sizes.decode.bytes) * chunk / plan.chunk
    return Role(sizes.denoiser + sizes.vae + text, sizes.adapter, 0, activations)


def learner(config: RunConfig, plan: Plan, sizes: Sizes) -> Role:
    """A learner rank with the settings of `config`, likewise. Of stage 3 this is the least that it may take.

    DeepSpeed keeps whole gradients up to stage 1, from there on a bucket as large as they are and a rank's share of the
    optimizer's moments and of another fp32 copy of the weights.
    """
    stage, ranks, one = config.learner.zero_stage, plan.learners, sizes.adapter
    frugal, used = config.learner.gradient_checkpointing, (sizes.update.bytes, sizes.critic.bytes)
    if frugal:
        used = (sizes.checkpointed.bytes, sizes.critic_checkpointed.bytes)
    cut, cut_critic = config.micro_batch / plan.micro_batch, config.critic_batch / plan.critic_batch
    share = 1 / ranks if stage == 3 else 1
    weights = sizes.denoiser * share
    if stage == 3:
        weights += min(sizes.denoiser - weights, GATHERED * sizes.itemsize)
    moments = 2 * one if stage == 0 else 3 * one / ranks
    gradients = (one, 2 * one, one + one / ranks, one + one / ranks)[stage]
    reward_gradient = sizes.judge.flops > 0
    judging = sizes.frugal.bytes + sizes.seen if frugal else (sizes.judge.bytes + plan.micro_batch * sizes.seen) * cut
    return Role(
        weights + sizes.critic_weights + reward_gradient * (sizes.vae + sizes.rewards),
        one * (sizes.adapters * share + (1 if config.learner.ema else 0)),
        moments + gradients + 3 * sizes.critic_trained,
        max(used[0] * cut, used[1] * cut_critic) + reward_gradient * judging,
    )
