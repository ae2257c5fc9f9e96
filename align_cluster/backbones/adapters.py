"""LoRA adapters on one frozen base: several by name, one active, all fp32. Sampler and learner use the same
functions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from align_cluster.backbones.base import Backbone


def lora_config(backbone: Backbone) -> LoraConfig:
    """peft's config of this backbone's adapters: Gaussian A, zero B (so a new adapter changes nothing), no dropout."""
    settings = backbone.config.lora
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        init_lora_weights="gaussian",
        target_modules=list(settings.targets or backbone.lora_targets),
    )


def add_adapters(backbone: Backbone, denoiser: torch.nn.Module, names: Sequence[str], seed: int = 0) -> torch.nn.Module:
    """Add adapters `names` to a frozen denoiser, all with the same seeded weights; only the first one is trainable."""
    state = torch.get_rng_state()
    for name in names:
        torch.manual_seed(seed)
        denoiser.add_adapter(lora_config(backbone), adapter_name=name)
    torch.set_rng_state(state)
    for parameter_name, parameter in denoiser.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(f".{names[0]}." in parameter_name and "lora_" in parameter_name)
    # Kept, because a walk over all modules at each change of adapter would take a tenth of a training step.
    denoiser.adapted_layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    _activate(denoiser, names[0])
    return denoiser


def adapter_parameters(denoiser: torch.nn.Module, name: str) -> dict[str, torch.nn.Parameter]:
    """Parameters of one adapter under the names that `load_lora_weights` expects (the adapter's own name left out)."""
    mark = f".{name}."
    return {
        full.replace(mark, "."): parameter
        for full, parameter in denoiser.named_parameters()
        if "lora_" in full and mark in full
    }


def _activate(denoiser: torch.nn.Module, name: str | None) -> None:
    # peft's set_adapter() also flips requires_grad, which would disturb the optimiser's hooks; here only the choice of
    # the active adapter changes.
    for layer in denoiser.adapted_layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


@contextmanager
def active_adapter(denoiser: torch.nn.Module, name: str | None) -> Iterator[None]:
    """Run with adapter `name`, or with the bare base for None; the adapter that was active before comes back."""
    layer = denoiser.adapted_layers[0]
    before = None if layer._disable_adapters else layer._active_adapter[0]
    _activate(denoiser, name)
    try:
        yield
    finally:
        _activate(denoiser, before)
