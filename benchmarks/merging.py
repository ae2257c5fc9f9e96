"""What do samplers lose when they add the LoRA into the base's weights? `rollout.merge_lora` follows the answer.

    python benchmarks/merging.py    # a minute

A merged network draws faster, and computes with bf16 roundings of W + s B A. For updates of many sizes this script
compares the velocities of the plain and of the merged network, both under bf16 autocast, with those of fp32: once with
the embedded model's fp32 weights, and once with weights that are bf16 numbers, as those of models on a GPU are.
"""

import json
from datetime import date
from pathlib import Path

import torch
from common import commit, machine

from align_cluster.backbones import SD3
from align_cluster.backbones.adapters import Merged, active_adapter, adapter_parameters, add_adapters

RESULTS = Path(__file__).parent / "results" / "merging.json"
SCALES = (1e-4, 1e-3, 1e-2, 3e-2)  # standard deviation of B; A's is 1 / rank
TEXTS = ["a photo of a red circle", "a photo of two blue squares"]
ROWS = 48


def network(precision: str, half: bool) -> tuple[SD3, torch.nn.Module]:
    """The embedded model with an adapter; with `half` its base weights are bf16 numbers."""
    backbone = SD3(SD3.Config(precision=precision))
    denoiser = backbone.load_denoiser()
    if half:
        for module in denoiser.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.data.bfloat16().float()
    return backbone, add_adapters(backbone, denoiser, ("default",))


def measure(half: bool) -> list[dict[str, float]]:
    """One row for each size of an update."""
    exact, plain, merged = network("fp32", half), network("bf16", half), network("bf16", half)
    generator = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(ROWS, *exact[0].latent_shape, generator=generator), torch.rand(ROWS, generator=generator)
    encoded = exact[0].encode(TEXTS * (ROWS // 2))
    text = [torch.stack([torch.tensor(getattr(one, part)) for one in encoded]) for part in ("sequence", "pooled")]
    directions = {
        name: torch.randn(parameter.shape, generator=generator)
        for name, parameter in adapter_parameters(exact[1], "default").items()
        if "lora_B" in name
    }
    sums, found = Merged(merged[1], "default"), []

    def velocity(pair: tuple[SD3, torch.nn.Module], adapter: str | None = "default") -> torch.Tensor:
        with torch.no_grad(), active_adapter(pair[1], adapter):
            return pair[0].velocity(pair[1], x, sigma, *text)

    for scale in SCALES:
        for _, denoiser in (exact, plain, merged):
            for name, parameter in adapter_parameters(denoiser, "default").items():
                if name in directions:
                    parameter.data.copy_(scale * directions[name])
        sums.merge()
        target, base = velocity(exact), velocity(exact, None)
        drawn = {"plain": velocity(plain), "merged": velocity(merged, None)}
        change = target - base
        layers = [
            (layer.get_base_layer().weight, layer.get_delta_weight("default")) for layer in exact[1].adapted_layers
        ]
        kept = sum(float((((w + d).bfloat16().float() - w.bfloat16().float()) * d).sum()) for w, d in layers)
        row = {
            "update_of_weights": _norm([d for _, d in layers]) / _norm([w for w, _ in layers]),
            "update_of_velocity": float(change.norm() / target.norm()),
            "weights_survive": kept / sum(float((d * d).sum()) for _, d in layers),
        }
        for name, v in drawn.items():
            row[f"error_{name}"] = float((v - target).norm() / target.norm())
        found.append(row)
    return found


def _norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt())


def main() -> None:
    torch.set_num_threads(1)
    kept = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "fp32 weights": measure(False),
        "bf16 weights": measure(True),
    }
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    names = list(kept["fp32 weights"][0])
    print(f"| base | {' | '.join(name.replace('_', ' ') for name in names)} |\n|{'---|' * (1 + len(names))}")
    for label in ("fp32 weights", "bf16 weights"):
        for row in kept[label]:
            print(f"| {label} | {' | '.join(f'{row[name]:.2g}' for name in names)} |")


if __name__ == "__main__":
    main()
