"""A LoRA that a run starts from: given the base's own names, taken up by new adapters, or added into the base."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from align_cluster.backbones.lora_file import FLAT, Lora, lora_file, named, read_lora
from align_cluster.errors import UserError


class Base(Protocol):
    """What is asked of the base's backbone: a `PipelineBackbone`, which imports this file."""

    config: Any
    part: str
    pipeline: str

    def stock(self, name: str) -> Any:
        """Return a class of diffusers by name."""


def fitted(backbone: Base, lora: Lora, expected: Mapping[str, torch.Tensor]) -> Lora:
    """Return a LoRA under the names of the parameters that adapters of this base have.

    Raises UserError with the first difference where it belongs to another base, or to other layers.
    """
    lora = _with_own_names(backbone, lora, [name.split(".lora_")[0] for name in expected])
    sizes = {name: tuple(value.shape) for name, value in expected.items()}
    held = {name: value.shape for name, value in lora.state.items()}
    problems = [
        f"its {name} is {_size(held[name])}, and that base's is {_size(sizes[name])}"
        for name in sorted(held.keys() & sizes.keys())
        if held[name] != sizes[name]
    ]
    problems += [f"it has nothing for {name}" for name in sorted(sizes.keys() - held.keys())]
    problems += [f"its {name} belongs to no adapted layer" for name in sorted(held.keys() - sizes.keys())]
    if lora.prefix not in ("", f"{backbone.part}."):
        problems = [f"it is one of a {lora.prefix[:-1]}, and that base has a {backbone.part}"]
    if problems:
        more = f", and {len(problems) - 1} differences more" if len(problems) > 1 else ""
        raise UserError(
            f"{lora.path} does not fit {backbone.config.path} ({problems[0]}{more}); "
            "give the backbone and targets it was trained with"
        )
    return lora


@torch.no_grad()
def start(backbone: Base, adapters: Iterable[Mapping[str, torch.nn.Parameter]]) -> None:
    """Let new adapters of a base begin with the weights of the LoRA that the settings name.

    What they add to a layer is what the LoRA adds, also where the settings give them another alpha.
    """
    settings = backbone.config.lora
    given = read_lora(lora_file(settings.path))
    for parameters in adapters:
        lora = fitted(backbone, given, parameters)
        scale = np.float32(lora.alpha / lora.rank / (settings.alpha / settings.rank))
        for name, parameter in parameters.items():
            value = lora.state[name] * (scale if ".lora_B." in name else np.float32(1))
            parameter.copy_(torch.from_numpy(value))


@torch.no_grad()
def merge(backbone: Base, denoiser: torch.nn.Module) -> None:
    """Add the LoRA that the settings name into the weights of a base, as sums in fp32. It may adapt any of its layers.

    Raises UserError where the base has no such layers.
    """
    layers = {name: layer for name, layer in denoiser.named_modules() if hasattr(layer, "weight")}
    lora = _with_own_names(backbone, read_lora(lora_file(backbone.config.lora.path)), layers)
    for name, (a, b) in lora.layers.items():
        weight = layers[name].weight if name in layers else torch.empty(0)
        if b.shape[0] * a[0].size != weight.numel():
            has = "has no such layer" if name not in layers else f"has {_size(tuple(weight.shape))} there"
            raise UserError(
                f"backbone.lora.path: {lora.path} adapts {name}, and {backbone.config.path} {has}; give a LoRA of this "
                "base"
            )
        delta = torch.from_numpy(b).flatten(1) @ torch.from_numpy(a).flatten(1) * (lora.alpha / lora.rank)
        weight.copy_(weight.float() + delta.view(weight.shape).to(weight.device))


def _with_own_names(backbone: Base, lora: Lora, layers: Iterable[str]) -> Lora:
    """Return a LoRA with the base's names of layers in the place of kohya's, as far as they are known.

    Where kohya's trainer has the layers of the model's first release, as for FLUX.1, diffusers translates.
    """
    lora = lora.with_names(list(layers))
    strange = {name: value for name, value in lora.layers.items() if name.startswith(FLAT)}
    if not strange:
        return lora
    raw = {}
    for layer, (a, b) in lora.layers.items():
        raw |= {f"{layer}.lora_down.weight": torch.from_numpy(a), f"{layer}.lora_up.weight": torch.from_numpy(b)}
        raw[f"{layer}.alpha"] = torch.tensor(float(lora.alpha))
    try:
        found = backbone.stock(backbone.pipeline).lora_state_dict(raw)
    except (ValueError, KeyError, RuntimeError):  # it knows no such names
        found = raw
    found = found[0] if isinstance(found, tuple) else found
    if found.keys() & raw.keys():
        raise UserError(
            f"{lora.path} names its layers in a way that is not known for {backbone.config.path}, such as "
            f"{next(iter(strange))}; convert it with a tool that writes diffusers' names"
        )
    return named({name: value.float().numpy() for name, value in found.items()}, {}, lora.path)


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
