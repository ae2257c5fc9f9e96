"""LoRA files outside a run: found, read, checked against a base model, and bound with the proof of a weight sync."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open

from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.pipeline import PipelineBackbone
from align_cluster.errors import UserError
from align_cluster.evaluate.checkpoints import offer
from align_cluster.files import user_path
from align_cluster.observe.rundir import RunDir
from align_cluster.plain import json_value
from align_cluster.rollouts.sampler import Sampler
from align_cluster.settings import LARGEST
from align_cluster.weights import check, publish

PREFIXES = ("transformer.", "unet.")  # diffusers' names for the denoiser
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors' names of types


@dataclass(frozen=True)
class Lora:
    """Holds the contents of one LoRA file, which messages call `path`.

    `state` has the adapter's weights (fp32) by parameter name, without the `prefix` that the names have in the file.
    `rank` and `alpha` are the LoRA's own, and `metadata` is the file's.
    """

    path: Path
    state: dict[str, np.ndarray]
    prefix: str
    rank: int
    alpha: float
    metadata: dict[str, str]


def find_lora(path: Path | str) -> Path:
    """Return the LoRA file that `path` means: the file itself, or the one in a run folder or LoRA folder."""
    path = user_path(path)
    if path.is_file():
        return path
    for file in (RunDir(path).lora_weights, path / "pytorch_lora_weights.safetensors"):
        if file.is_file():
            return file
    raise UserError(
        f"{path} holds no LoRA; give a .safetensors file, or the folder of a run that has finished{offer(path)}"
    )


def find_config(lora: Path) -> Path:
    """Return the settings of the run that a LoRA comes from: the config.yaml beside its file, or one folder up."""
    file = find_lora(lora)
    for folder in (file.parent, file.parent.parent):
        if RunDir(folder).config.is_file():
            return RunDir(folder).config
    raise UserError(f"{lora} has no config.yaml beside it that names its base model; add --config with a run file")


def read_lora(file: Path, shown: Path | None = None) -> Lora:
    """Read a LoRA of a denoiser, as diffusers' `save_lora_weights` writes it, in any type of float.

    Messages call it `shown`, by default the file. Raises UserError for any other file, and for weights or a scale that
    are no finite numbers.
    """
    shown = shown or file
    try:
        with safe_open(file, framework="pt") as tensors:
            types = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
            odd = next((name for name, dtype in types.items() if dtype not in FLOATS), None)
            if odd:
                raise UserError(
                    f"{shown}: its {odd!r} is {types[odd]}, and a LoRA's weights are floats; convert it first"
                )
            raw = {name: tensors.get_tensor(name).float().numpy() for name in types}
            metadata = tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{shown} cannot be read as safetensors ({reason}); give the file that a run wrote") from None
    prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in raw)), None)
    state = {name.removeprefix(prefix or ""): value for name, value in raw.items()}
    ranks = {value.shape[0] if value.ndim > 1 else 0 for name, value in state.items() if ".lora_A." in name}
    if len(ranks) != 1 or not prefix or 0 in ranks or not all(map(str.isprintable, raw)):
        raise UserError(f"{shown} is no LoRA of a denoiser with one rank; give the file that a run wrote")
    broken = next((name for name, value in raw.items() if not np.isfinite(value).all()), None)
    if broken:
        raise UserError(
            f"{shown}: its {broken!r} holds NaN or infinity, as of training that diverged; give another file"
        )
    (rank,) = ranks
    return Lora(shown, state, prefix, rank, _alpha(shown, metadata, prefix, rank), metadata)


def _alpha(file: Path, metadata: dict[str, str], prefix: str, rank: int) -> float:
    """Return the alpha that gives peft's scale alpha / rank, from the metadata that diffusers writes, else the rank.

    A rank-stabilised LoRA has the scale alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
    """
    try:
        about = json_value(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise UserError(f"{file}: its lora_adapter_metadata is no JSON ({error}); give the file as it was") from None
    told = {key.removeprefix(prefix): value for key, value in about.items()} if isinstance(about, dict) else {}
    alpha = told.get("lora_alpha", rank)
    if not isinstance(about, dict) or isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise UserError(f"{file}: its metadata has no number for lora_alpha; give the file as it was")
    if not 0 < alpha < LARGEST:
        raise UserError(f"{file}: its lora_alpha is {str(alpha)[:20]}; a scale is above 0, and finite")
    if told.get("alpha_pattern") or told.get("use_dora"):
        raise UserError(
            f"{file} has a scale for each layer, or is a DoRA, and one scale for all is read; merge it first"
        )
    return alpha * rank**0.5 if told.get("use_rslora") else alpha


def check_fits(backbone: PipelineBackbone, lora: Lora) -> None:
    """Raise UserError where a LoRA belongs to another base model.

    The base's settings alone decide that, so the answer comes before any weights are read.
    """
    with init_empty_weights():
        network = backbone.stock(backbone.network).from_config(backbone.network_config)
        add_adapters(backbone, network, ("default",))
    expected = {name: tuple(value.shape) for name, value in adapter_parameters(network, "default").items()}
    held = {name: value.shape for name, value in lora.state.items()}
    problems = [
        f"its {name} is {_size(held[name])}, and that base's is {_size(expected[name])}"
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


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def bind(sampler: Sampler, lora: Lora) -> None:
    """Give a sampler the LoRA, and prove from the sampler's own parameters that it holds it."""
    manifest, buffer = publish(lora.state, version=sampler.version + 1)
    check(manifest, [sampler.adopt(manifest, buffer)], expected=1)
