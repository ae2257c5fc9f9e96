"""LoRA files for sampling, evaluation and export outside a run, bound with the same proof as a weight sync."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from align_cluster.backbones import BACKBONES
from align_cluster.backbones.base import BackboneSection
from align_cluster.backbones.pipeline import PipelineBackbone
from align_cluster.errors import UserError
from align_cluster.observe.rundir import RunDir
from align_cluster.rollouts.sampler import Sampler
from align_cluster.weights import check, publish

PREFIXES = ("transformer.", "unet.")  # diffusers' names for the denoiser


@dataclass(frozen=True)
class Lora:
    """Contents of one file: adapter weights by parameter name (fp32), the prefix that they have in the file, their
    rank, their scale alpha, and the file's metadata."""

    path: Path
    state: dict[str, np.ndarray]
    prefix: str
    rank: int
    alpha: float
    metadata: dict[str, str]


def find_lora(path: Path | str) -> Path:
    """The file that `path` means: itself, or the one in a run folder or LoRA folder."""
    path = Path(path).expanduser()
    if path.is_file():
        return path
    for file in (RunDir(path).lora_weights, path / "pytorch_lora_weights.safetensors"):
        if file.is_file():
            return file
    raise UserError(f"{path} holds no LoRA; give a .safetensors file, or the folder of a run that has finished")


def find_config(lora: Path) -> Path:
    """Settings of the run that a LoRA comes from: the config.yaml beside its file, or one folder up."""
    file = find_lora(lora)
    for folder in (file.parent, file.parent.parent):
        if RunDir(folder).config.is_file():
            return RunDir(folder).config
    raise UserError(f"{lora} has no config.yaml beside it that names its base model; add --config with a run file")


def read_lora(file: Path) -> Lora:
    """Read a file that `save_lora_weights` wrote. UserError where it is something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            raw = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
            metadata = tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error}); give the file that a run wrote") from None
    prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in raw)), None)
    state = {name.removeprefix(prefix or ""): value.astype(np.float32) for name, value in raw.items()}
    ranks = {value.shape[0] for name, value in state.items() if ".lora_A." in name}
    if len(ranks) != 1 or not prefix:
        raise UserError(f"{file} is no LoRA of a denoiser with one rank; give the file that a run wrote")
    (rank,) = ranks
    alpha = json.loads(metadata.get("lora_adapter_metadata", "{}")).get(f"{prefix}lora_alpha", rank)
    return Lora(file, state, prefix, rank, alpha, metadata)


def shaped(config: BackboneSection, lora: Lora) -> BackboneSection:
    """The settings of a backbone whose adapters are as large as `lora`."""
    return config.model_copy(update={"lora": config.lora.model_copy(update={"rank": lora.rank, "alpha": lora.alpha})})


def check_fits(backbone: PipelineBackbone, lora: Lora) -> None:
    """UserError where a LoRA is of another base: found out from the base's settings alone, before weights are read."""
    from accelerate import init_empty_weights

    from align_cluster.backbones.adapters import adapter_parameters, add_adapters

    with init_empty_weights():
        shell = backbone.stock(backbone.network).from_config(backbone.network_config)
        add_adapters(backbone, shell, ("default",))
    expected = {name: tuple(value.shape) for name, value in adapter_parameters(shell, "default").items()}
    held = {name: value.shape for name, value in lora.state.items()}
    problems = [
        f"its {name} is {_sizes(held[name])}, and that base's is {_sizes(expected[name])}"
        for name in sorted(held.keys() & expected.keys())
        if held[name] != expected[name]
    ]
    problems += [f"it has nothing for {name}" for name in sorted(expected.keys() - held.keys())]
    problems += [f"its {name} belongs to no adapted layer" for name in sorted(held.keys() - expected.keys())]
    if lora.prefix != f"{backbone.part}.":
        problems = [f"it is one of a {lora.prefix[:-1]}, and that base has a {backbone.part}"]
    if problems:
        more = f", and {len(problems) - 1} differences more" if len(problems) > 1 else ""
        raise UserError(
            f"{lora.path} does not fit {backbone.config.path} ({problems[0]}{more}); "
            "give the backbone and targets it was trained with"
        )


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def base_sampler(config: BackboneSection, lora: Lora | None, threads: int) -> Sampler:
    """A sampler of the base model that `lora` can be bound to, on this machine's GPU, or else its CPU."""
    import torch

    if lora:
        config = shaped(config, lora)
        check_fits(BACKBONES[config.kind](config), lora)
    return Sampler(config, threads, "local", "cuda" if torch.cuda.is_available() else "cpu")


def bind(sampler: Sampler, lora: Lora) -> None:
    """Give a sampler the LoRA, and prove from its own parameters that it holds it."""
    manifest, buffer = publish(lora.state, version=sampler.version + 1)
    check(manifest, [sampler.adopt(manifest, buffer)], expected=1)


def sampler_with(config: BackboneSection, file: Path | None, threads: int) -> Sampler:
    """A sampler that holds the LoRA of `file`, or the base model."""
    lora = read_lora(file) if file else None
    sampler = base_sampler(config, lora, threads)
    if lora:
        bind(sampler, lora)
    return sampler
