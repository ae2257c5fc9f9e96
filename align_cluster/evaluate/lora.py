"""LoRA files outside a run: found, checked against a base model, and bound with the proof of a weight sync."""

from pathlib import Path

from accelerate import init_empty_weights

from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.lora_file import Lora, lora_file
from align_cluster.backbones.lora_start import fitted
from align_cluster.backbones.pipeline import PipelineBackbone
from align_cluster.errors import UserError
from align_cluster.evaluate.checkpoints import offer
from align_cluster.files import user_path
from align_cluster.observe.rundir import RunDir
from align_cluster.rollouts.sampler import Sampler
from align_cluster.weights import check, publish


def find_lora(path: Path | str) -> Path:
    """Return the LoRA file that `path` means: the file itself, or the one in a run folder or LoRA folder."""
    path, file = user_path(path), lora_file(path)
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


def check_fits(backbone: PipelineBackbone, lora: Lora) -> Lora:
    """Return a LoRA with the base's own names of layers.

    The base's settings alone decide whether it fits, so the answer comes before any weights are read. Raises UserError
    where it belongs to another base model.
    """
    with init_empty_weights():
        network = backbone.stock(backbone.network).from_config(backbone.network_config)
        add_adapters(backbone, network, ("default",), start=False)
    return fitted(backbone, lora, adapter_parameters(network, "default"))


def bind(sampler: Sampler, lora: Lora) -> None:
    """Give a sampler the LoRA, and prove from the sampler's own parameters that it holds it."""
    manifest, buffer = publish(lora.state, version=sampler.version + 1)
    check(manifest, [sampler.adopt(manifest, buffer)], expected=1)
