"""The result of a finished run: its LoRA, and what is known of it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_cluster import __version__
from align_cluster.backbones import BACKBONES
from align_cluster.backbones.lora_file import Lora, read_lora
from align_cluster.backbones.pipeline import PipelineBackbone
from align_cluster.config.load import load
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.evaluate.checkpoints import Opened, offer
from align_cluster.evaluate.lora import check_fits
from align_cluster.files import user_path
from align_cluster.observe import rundata
from align_cluster.observe.rundata import RunData
from align_cluster.observe.rundir import RunDir


@dataclass(frozen=True)
class Result:
    """Holds what a run left, or would have left at a checkpoint: its record, its settings, its LoRA, and the base model
    that this LoRA is for."""

    run: RunData
    config: RunConfig
    backbone: PipelineBackbone
    lora: Lora

    @property
    def steps(self) -> int:
        """Return the number of steps that the LoRA has been trained for."""
        return self.run.summary.get("steps", self.config.steps)

    @property
    def facts(self) -> dict[str, str]:
        """Say where the weights come from, as metadata of a safetensors file."""
        run, config = self.run, self.config
        rewards = {side: getattr(run, side).get("overall", {}) for side in ("before", "after")}
        return {
            "run": run.name,
            "base_model": config.backbone.path,
            "backbone": config.backbone.kind,
            "algorithm": config.algorithm.kind,
            "steps": str(self.steps),
            "rank": str(self.lora.rank),
            "alpha": f"{self.lora.alpha:g}",
            "config_hash": run.summary["config_hash"],
            "headline": str(run.headline),
            **{f"reward_{side}": json.dumps(scores) for side, scores in rewards.items()},
            "align_cluster": __version__,
        }


def public(config: RunConfig, base_model: str | None = None) -> RunConfig:
    """Return settings that others may read: the base model by its id, if given, and no folder but by its last name."""
    path, folder = config.backbone.path, user_path(config.backbone.path)
    base = base_model or (folder.resolve().name if path != "embedded" and folder.is_dir() else path)
    data = _without_folders(config.model_dump(mode="json"))
    return RunConfig.model_validate(data | {"backbone": data["backbone"] | {"path": base}})


def _without_folders(value: Any) -> Any:
    """Replace every absolute path by its last name, at any depth."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and re.match(r"/|~\w*/|file:/", value) else value


def read_result(run: Opened, overrides: Sequence[str] = ()) -> Result:
    """Read the folder of a run that has ended, or of a checkpoint, with `overrides` of its settings.

    No weights of the base model are read. Raises UserError where the run has not finished, and where its LoRA is
    missing or fits neither its settings nor its base model.
    """
    files = RunDir(run.path)
    data = rundata.load(files)
    if not data.summary:
        steps = f"{len(data.rows)} of {data.config.get('steps', '?')} steps are there"
        raise UserError(
            f"{run.path} has not finished ({steps}), so it has no LoRA; export it once its summary.json is "
            f"there{offer(run.path)}"
        )
    config = load(files.config, overrides)
    if not files.lora_weights.is_file():
        raise UserError(
            f"{run.path} has lost its {files.lora_weights.relative_to(files.path)}; give the folder as it was"
        )
    lora, settings = read_lora(files.lora_weights, run.checkpoint), config.backbone.lora
    if lora.rank != settings.rank:
        raise UserError(
            f"{lora.path} has rank {lora.rank}, and the run's config.yaml says rank {settings.rank}; "
            "give the folder as `train` left it"
        )
    # Weights are merged and written, never run. The file says the scale: the run's own is in its weights.
    plain = {"precision": "fp32", "compile": False, "attention": None}
    plain |= {"lora": settings.without_start().model_copy(update={"alpha": lora.alpha})}
    backbone = BACKBONES[config.backbone.kind](config.backbone.model_copy(update=plain))
    return Result(data, config, backbone, check_fits(backbone, lora))
