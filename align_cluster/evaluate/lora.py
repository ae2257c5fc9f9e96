"""LoRA files for sampling and evaluation outside a run, bound with the same proof as a weight sync."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from align_cluster.backbones.base import BackboneSection
from align_cluster.observe.rundir import RunDir
from align_cluster.rollouts.sampler import Sampler
from align_cluster.types import UserError
from align_cluster.weights import check, publish

PREFIXES = ("transformer.", "unet.")  # diffusers' names for the denoiser


@dataclass(frozen=True)
class Lora:
    """Contents of one file: adapter weights by parameter name (fp32), their rank and their scale alpha."""

    path: Path
    state: dict[str, np.ndarray]
    rank: int
    alpha: float


def find_lora(path: Path | str) -> Path:
    """The file that `path` means: itself, or the one in a run folder or LoRA folder."""
    path = Path(path).expanduser()
    if path.is_file():
        return path
    for file in (RunDir(path).lora_weights, path / "pytorch_lora_weights.safetensors"):
        if file.is_file():
            return file
    raise UserError(f"{path} holds no LoRA; give a .safetensors file, or the folder of a run that has finished")


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
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    return Lora(file, state, rank, settings.get(f"{prefix}lora_alpha", rank))


def sampler_with(backbone: BackboneSection, file: Path | None, threads: int) -> Sampler:
    """A sampler on this machine's GPU or CPU that holds the LoRA of `file`, or the base model."""
    import torch

    lora = read_lora(file) if file else None
    if lora:
        shape = backbone.lora.model_copy(update={"rank": lora.rank, "alpha": lora.alpha})
        backbone = backbone.model_copy(update={"lora": shape})
    sampler = Sampler(backbone, threads, "local", "cuda" if torch.cuda.is_available() else "cpu")
    if lora:
        manifest, buffer = publish(lora.state, version=1)
        try:
            check(manifest, [sampler.adopt(manifest, buffer)], expected=1)
        except RuntimeError as error:
            raise UserError(
                f"{lora.path} does not fit {backbone.path} ({error}); give the backbone and targets it was trained with"
            ) from None
    return sampler
