"""A run's result for other tools: LoRA files, a merged denoiser or a whole pipeline folder, each with a model card."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align_cluster.backbones.adapters import lora_config
from align_cluster.backbones.lora_file import PEFT, Lora
from align_cluster.config.load import dump
from align_cluster.errors import UserError
from align_cluster.evaluate.card import ADAPTERS, comfyui_name, licence_of, write_card
from align_cluster.evaluate.checkpoints import opened
from align_cluster.evaluate.lora import bind
from align_cluster.evaluate.result import Result, public, read_result
from align_cluster.files import new_folder, save_tensors, write_json, write_text
from align_cluster.machine import cores
from align_cluster.observe.rundir import RunDir
from align_cluster.rollouts.sampler import Sampler
from align_cluster.settings import HUB_ID

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    run: str | Path,
    form: str,
    out: Path,
    *,
    precision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    overrides: Sequence[str] = (),
) -> list[str]:
    """Write the result of the run or checkpoint `run` as `form` (a key of FORMS) into the new folder `out`.

    `precision` is that of merged weights, fp32 by default. `base_model` is the hub's id of the base model, for a run on
    a local copy, and `license` the hub's id of its licence; what is written names no folder of this machine.
    `overrides` change settings of the run, such as a backbone.path that has moved. Returns notes on what the card could
    not say. Raises UserError for an unknown form or precision, for what is no id, for a run that has not finished, and
    for a LoRA that does not fit the base model; after any error there is no folder.
    """
    if form not in FORMS:
        raise UserError(f"--to {form} is no form of a result; choose {', '.join(FORMS)}")
    if precision and form in ADAPTERS:
        raise UserError(
            f"--precision is of merged weights, and a LoRA file is always fp32; leave it out with --to {form}"
        )
    if precision and precision not in PRECISIONS:
        raise UserError(f"--precision {precision} is not there; choose {', '.join(PRECISIONS)}")
    if base_model and not re.fullmatch(HUB_ID, base_model):
        raise UserError(f"--base-model {base_model!r} is no id of the hub; write it as OWNER/NAME")
    if license and not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", license):
        raise UserError(f"--license {license!r} is no id of the hub; write it as the hub does, such as apache-2.0")
    with new_folder(out) as folder, opened(run) as source:
        result = read_result(source, overrides)
        result = replace(result, config=public(result.config, base_model))
        licence = licence_of(result.backbone, license)
        FORMS[form](result, folder, PRECISIONS[precision or "fp32"])
        write_text(RunDir(folder).config, dump(result.config))
        write_card(result, folder, form=form, title=out.name, licence=licence)
    notes, base = [], result.config.backbone.path
    if base != "embedded" and not re.fullmatch(HUB_ID, base):
        notes.append(f"the card calls the base model {base}, as its folder here; add --base-model, its id on the hub")
    if not license and licence["license"] == "other" and "license_link" not in licence:
        notes.append("the card does not name the base model's licence; add --license, such as --license apache-2.0")
    return notes


def write_lora(result: Result, folder: Path, dtype: torch.dtype) -> None:
    """Write the LoRA twice, in fp32: as diffusers does, and for tools that read no alpha from metadata."""
    lora, facts = result.lora, result.facts
    ours = {f"{lora.prefix}{name}": value for name, value in lora.state.items()}
    save_tensors(folder / "pytorch_lora_weights.safetensors", ours, lora.metadata | facts)
    facts = facts | {"format": "pt", "alpha": str(lora.rank)}
    save_tensors(folder / comfyui_name(result.run.name), for_comfyui(lora), facts)


def for_comfyui(lora: Lora) -> dict[str, np.ndarray]:
    """Return the LoRA under the names that ComfyUI looks for, with its scale alpha / rank inside the B matrices.

    ComfyUI takes alpha from tensors, which diffusers refuses for SD3, and a scale of 1 where there are none. Of
    transformers it knows diffusers' names; of UNets it knows those of kohya's trainer, as most other tools do.
    """
    tensors = {}
    for name, value in lora.state.items():
        layer, matrix = name.removesuffix(".weight").rsplit(".lora_", 1)
        scaled = value * np.float32(lora.alpha / lora.rank) if matrix == "B" else value
        kohya = f"lora_unet_{layer.replace('.', '_')}.lora_{'up' if matrix == 'B' else 'down'}.weight"
        tensors[kohya if lora.prefix == "unet." else f"{lora.prefix}{name}"] = scaled
    return tensors


def write_peft(result: Result, folder: Path, dtype: torch.dtype) -> None:
    """Write the LoRA as `peft.PeftModel.from_pretrained` reads it, in fp32."""
    lora = result.lora
    settings = lora_config(result.backbone).to_dict() | {"lora_alpha": lora.alpha}
    about = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    write_json(folder / "adapter_config.json", about | {"base_model_name_or_path": result.config.backbone.path})
    named = {f"{PEFT}{name}": value for name, value in lora.state.items()}
    save_tensors(folder / "adapter_model.safetensors", named, result.facts | {"format": "pt"})


def merge(result: Result, dtype: torch.dtype) -> Any:
    """Return the base's denoiser with the LoRA added into its weights in fp32, and only then rounded to `dtype`."""
    sampler = Sampler(result.backbone.config, threads=cores(), name="export", device="cpu")
    bind(sampler, result.lora)
    denoiser = sampler.denoiser
    denoiser.fuse_lora()
    denoiser.unload_lora()
    return denoiser.to(dtype)


def write_merged(result: Result, folder: Path, dtype: torch.dtype) -> None:
    """Write the merged denoiser as its class's `from_pretrained` reads it."""
    denoiser = merge(result, dtype)
    denoiser.register_to_config(_name_or_path=result.config.backbone.path)  # else the folder that it was read from
    denoiser.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # which this user alone could read
        weights.chmod((folder / "config.json").stat().st_mode)


def write_pipeline(result: Result, folder: Path, dtype: torch.dtype) -> None:
    """Write the base's pipeline with the merged denoiser in the place of its own; the other parts are copied."""
    backbone = result.backbone
    base = Path(backbone.source)
    if not base.is_dir():
        with backbone.reading("model_index.json"):
            base = Path(backbone.stock("DiffusionPipeline").download(backbone.source))
    write_merged(result, folder / backbone.part, dtype)
    shutil.copy(base / "model_index.json", folder)
    for part in backbone.index:
        if part != backbone.part and (base / part).is_dir():
            shutil.copytree(base / part, folder / part)


FORMS: dict[str, Callable[[Result, Path, torch.dtype], None]] = {
    "lora": write_lora,
    "peft": write_peft,
    "merged": write_merged,
    "diffusers": write_pipeline,
}
