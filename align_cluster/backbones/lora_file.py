"""LoRA files of a denoiser: those that runs write, and those of diffusers, peft, and kohya's trainer or ComfyUI."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from align_cluster.errors import UserError
from align_cluster.files import read_text, user_path
from align_cluster.plain import MAX_CHARACTERS, json_value
from align_cluster.settings import LARGEST

PREFIXES = ("transformer.", "unet.")  # diffusers' names for the denoiser
PEFT = "base_model.model."  # what peft's own files have before a layer's name
FLAT = ("lora_unet_", "lora_transformer_")  # kohya's, with an underscore for each dot of a layer's name
FOLDERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "lora/pytorch_lora_weights.safetensors")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors' names of types
MATRICES = {"lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B"}
WEIGHT = re.compile(
    r"(?P<layer>.+)\.(?P<matrix>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.default)?\.weight"
)


@dataclass(frozen=True)
class Lora:
    """Holds the contents of one LoRA file, which messages call `path`.

    `state` has the adapter's weights (fp32) by parameter name, without the `prefix` that the names have in the file.
    `rank` and `alpha` are the LoRA's own: it adds alpha / rank times B @ A to a layer. `metadata` is the file's.
    """

    path: Path
    state: dict[str, np.ndarray]
    prefix: str
    rank: int
    alpha: float
    metadata: dict[str, str]

    @property
    def layers(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return (A, B) by the names of the layers."""
        names = [name.removesuffix(".lora_A.weight") for name in self.state if name.endswith(".lora_A.weight")]
        return {name: (self.state[f"{name}.lora_A.weight"], self.state[f"{name}.lora_B.weight"]) for name in names}

    def with_names(self, layers: list[str]) -> "Lora":
        """Return it with the names of `layers` where the file has kohya's, with an underscore for each dot."""
        known = {f"{prefix}{layer.replace('.', '_')}": layer for prefix in FLAT for layer in layers}
        parts = ((*name.split(".lora_", 1), value) for name, value in self.state.items())
        return replace(self, state={f"{known.get(layer, layer)}.lora_{end}": value for layer, end, value in parts})


def lora_file(path: Path | str) -> Path:
    """Return the file that `path` means: the file itself, or the one in a folder of diffusers, peft or a run.

    Where there is none, it is the file that diffusers would have there.
    """
    path = user_path(path)
    files = [path / name for name in FOLDERS]
    return path if path.is_file() else next((file for file in files if file.is_file()), files[0])


def read_lora(file: Path, shown: Path | None = None) -> Lora:
    """Read a LoRA of a denoiser in any type of float.

    Messages call it `shown`, by default the file. Layers of other ranks are filled up with zeros to the largest one,
    and where layers have scales of their own, these go into the B matrices: it adds the same to every layer. Raises
    UserError for any other file, and for weights or a scale that are no finite numbers.
    """
    shown = shown or file
    raw, metadata = read_tensors(file, shown)
    return named(raw, metadata, shown, file.parent / "adapter_config.json")


def read_tensors(file: Path, shown: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors of a file of floats, in fp32, and its metadata."""
    try:
        with safe_open(file, framework="pt") as tensors:
            types = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
            odd = next((name for name, dtype in types.items() if dtype not in FLOATS), None)
            if odd:
                raise UserError(
                    f"{shown}: its {odd!r} is {types[odd]}, and a LoRA's weights are floats; convert it first"
                )
            return {name: tensors.get_tensor(name).float().numpy() for name in types}, tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{shown} cannot be read as safetensors ({reason}); give the file of a LoRA") from None


def named(raw: dict[str, np.ndarray], metadata: dict[str, str], shown: Path, beside: Path | None = None) -> Lora:
    """Return the LoRA whose file holds these tensors; `beside` is where peft keeps the settings of its own files."""
    prefix = next((one for one in (*PREFIXES, PEFT) if all(name.startswith(one) for name in raw)), "")
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, value in raw.items():
        layer, _, end = name.removeprefix(prefix).rpartition(".")
        if found := WEIGHT.fullmatch(name.removeprefix(prefix)):
            layer, end = found["layer"], MATRICES[found["matrix"]]
        elif end != "alpha" or not layer:
            raise UserError(f"{shown} is no LoRA of a denoiser (it holds {name[:80]!r}); give the file of one")
        pairs.setdefault(layer, {})[end] = value
    odd = next((layer for layer, pair in pairs.items() if not _is_pair(pair)), None)
    if odd is not None or not pairs or not all(map(str.isprintable, raw)):
        raise UserError(f"{shown} is no LoRA of a denoiser (no pair of matrices for {odd!r}); give the file of one")
    broken = next((name for name, value in raw.items() if not np.isfinite(value).all()), None)
    if broken:
        raise UserError(
            f"{shown}: its {broken!r} holds NaN or infinity, as of training that diverged; give another file"
        )
    told = _told(shown, metadata, prefix, beside)
    sizes = {layer: (len(pair["A"]), _alpha(shown, pair, told)) for layer, pair in pairs.items()}
    rank, alpha = max(rank for rank, _ in sizes.values()), next(iter(sizes.values()))[1]
    scales = dict.fromkeys(pairs, 1.0)
    if len(set(sizes.values())) > 1:
        alpha, scales = rank, {layer: own / count for layer, (count, own) in sizes.items()}
    state = {}
    for layer, pair in pairs.items():
        state[f"{layer}.lora_A.weight"] = _filled(pair["A"], 0, rank)
        state[f"{layer}.lora_B.weight"] = _filled(pair["B"], 1, rank) * np.float32(scales[layer])
    return Lora(shown, state, prefix if prefix in PREFIXES else "", rank, alpha, metadata)


def _is_pair(pair: dict[str, np.ndarray]) -> bool:
    """Tell whether a layer has both matrices, of one rank."""
    return all(half in pair and pair[half].ndim > 1 for half in "AB") and len(pair["A"]) == pair["B"].shape[1] > 0


def _filled(matrix: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Return a matrix with zeros up to the rank along an axis."""
    more = [(0, rank - size if index == axis else 0) for index, size in enumerate(matrix.shape)]
    return np.pad(matrix, more)


def _told(file: Path, metadata: dict[str, str], prefix: str, beside: Path | None) -> dict[str, Any]:
    """Return what the metadata that diffusers writes, or peft's own file, tells about the LoRA."""
    try:
        own = read_text(beside, MAX_CHARACTERS) if prefix == PEFT and beside and beside.is_file() else "{}"
        about = json_value(metadata.get("lora_adapter_metadata", own))
    except ValueError as error:
        raise UserError(f"{file}: its lora_adapter_metadata is no JSON ({error}); give the file as it was") from None
    if not isinstance(about, dict):
        raise UserError(f"{file}: its metadata has no number for lora_alpha; give the file as it was")
    told = {key.removeprefix(prefix): value for key, value in about.items()}
    if told.get("alpha_pattern") or told.get("use_dora"):
        raise UserError(
            f"{file} has a scale for each layer, or is a DoRA, and one scale for all is read; merge it first"
        )
    return told


def _alpha(file: Path, pair: dict[str, np.ndarray], told: dict[str, Any]) -> float:
    """Return the alpha that gives peft's scale alpha / rank: the layer's own, else what is told of all, else the rank.

    A rank-stabilised LoRA has the scale alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
    """
    rank = len(pair["A"])
    alpha = pair["alpha"].sum().item() if "alpha" in pair else told.get("lora_alpha", rank)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise UserError(f"{file}: its metadata has no number for lora_alpha; give the file as it was")
    if not 0 < alpha < LARGEST:
        raise UserError(f"{file}: its lora_alpha is {str(alpha)[:20]}; a scale is above 0, and finite")
    return alpha * rank**0.5 if told.get("use_rslora") else alpha
