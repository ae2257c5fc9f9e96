"""Named LoRA adapters on one frozen base: one is active, all are fp32. Sampler and learner share this code.

peft takes seconds to import, so it is imported where adapters are made: the driver makes none.
"""

import difflib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from align_cluster.backbones import lora_start
from align_cluster.backbones.base import CRITIC, Backbone
from align_cluster.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTABLE = (torch.nn.Linear, torch.nn.Conv2d)  # layers whose adapters can be merged and exported here


def lora_config(backbone: Backbone) -> "LoraConfig":
    """Return peft's configuration of this backbone's adapters.

    A begins at random and B at 0, so a new adapter changes nothing. There is no dropout.
    """
    from peft import LoraConfig

    settings = backbone.config.lora
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        target_modules=list(settings.targets or backbone.lora_targets),
    )


def unmatched(denoiser: torch.nn.Module, targets: Sequence[str]) -> str | None:
    """Say which target names no layer that peft can adapt as the other backbones' are, or return None.

    peft takes a name for the end of a layer's path, and passes over a name without a layer as long as another has one.
    """
    layers = {path: getattr(layer, "base_layer", layer) for path, layer in denoiser.named_modules()}
    for target in targets:
        found = [layer for path, layer in layers.items() if path == target or path.endswith(f".{target}")]
        if not found or not all(isinstance(layer, ADAPTABLE) for layer in found):
            ends = {".".join(path.split(".")[-2:]) for path, layer in layers.items() if isinstance(layer, ADAPTABLE)}
            near = difflib.get_close_matches(target, sorted(ends), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are layers such as {', '.join(sorted(ends)[:4])}"
            wrong = "which is no linear layer or convolution" if found else "which no layer's name ends with"
            return f"backbone.lora.targets has {target!r}, {wrong}; {hint}"
    return None


def add_adapters(
    backbone: Backbone, denoiser: torch.nn.Module, names: Sequence[str], seed: int = 0, start: bool = True
) -> torch.nn.Module:
    """Add adapters `names` to a frozen denoiser, all with the same seeded weights; only the first one is trainable.

    With `start`, all but the critic's begin with the LoRA that the settings name, if they do. The critic's reads the
    base as a new adapter would.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if problem := unmatched(denoiser, backbone.config.lora.targets or ()):
        raise UserError(problem)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
        for name in names:
            torch.manual_seed(seed)
            denoiser.add_adapter(lora_config(backbone), adapter_name=name)
    torch.set_rng_state(state)
    for parameter_name, parameter in denoiser.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(f".{names[0]}." in parameter_name and "lora_" in parameter_name)
    # This list is kept because a walk over all modules at each change of adapter takes a tenth of a training step.
    denoiser.adapted_layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    _activate(denoiser, names[0])
    if start and backbone.config.lora.starts and (actors := [name for name in names if name != CRITIC]):
        lora_start.start(backbone, [adapter_parameters(denoiser, name) for name in actors])
    return denoiser


def adapter_parameters(denoiser: torch.nn.Module, name: str) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of one adapter under the names that `load_lora_weights` expects.

    These names leave out the adapter's own name.
    """
    mark = f".{name}."
    return {
        full.replace(mark, "."): parameter
        for full, parameter in denoiser.named_parameters()
        if "lora_" in full and mark in full
    }


def _activate(denoiser: torch.nn.Module, name: str | None) -> None:
    # peft's set_adapter() also changes requires_grad, which would disturb the optimiser's hooks. This changes only the
    # choice of the active adapter.
    for layer in denoiser.adapted_layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


@contextmanager
def active_adapter(denoiser: torch.nn.Module, name: str | None) -> Iterator[None]:
    """Run the block with adapter `name`, or the bare base for None, and restore the previous adapter afterwards."""
    layer = denoiser.adapted_layers[0]
    before = None if layer._disable_adapters else layer._active_adapter[0]
    _activate(denoiser, name)
    try:
        yield
    finally:
        _activate(denoiser, before)


class Merged:
    """Adds one adapter into the base's own weights, so that forward passes cost what the bare base costs.

    A copy of the base's weights stays on the CPU. Each merge starts from it, because subtracting the old adapter would
    leave rounding errors. In bf16 the sum rounds, so a merged network differs a little from base plus adapter.
    """

    def __init__(self, denoiser: torch.nn.Module, name: str) -> None:
        self.denoiser, self.name = denoiser, name
        self.base = [layer.get_base_layer().weight.detach().cpu().clone() for layer in denoiser.adapted_layers]

    @torch.no_grad()
    def merge(self) -> None:
        """Replace the weights that were merged before by the adapter's present weights."""
        for layer, weight in zip(self.denoiser.adapted_layers, self.base, strict=True):
            merged = layer.get_base_layer().weight
            delta = layer.get_delta_weight(self.name)
            merged.copy_(weight.to(delta.device).float() + delta.float())
        _activate(self.denoiser, None)
