"""Finished runs, as `train` leaves them, whose LoRA is random in place of trained."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align_cluster.backbones.adapters import add_adapters
from align_cluster.backbones.sd3 import SD3
from align_cluster.config.load import config_hash, dump, load
from align_cluster.files import write_json, write_text
from align_cluster.observe.grids import save_grid
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import MetricWriter
from align_cluster.observe.table import summarise
from align_cluster.rollouts.sampler import Sampler

from ..backbones.contract import TEXT, Case, random_state

TINY = Path(__file__).parents[1] / "system" / "tiny.yaml"


@dataclass(frozen=True)
class Finished:
    """A run folder, the case of its backbone, and the backbone's denoiser with the run's LoRA beside the base."""

    case: Case
    path: Path
    backbone: Any
    denoiser: torch.nn.Module


@pytest.fixture(scope="session")
def finished(tiny_pipeline: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """Function kind -> Finished, of rank 3 and alpha 6."""

    @cache
    def make(kind: str) -> Finished:
        case = Case(kind, tiny_pipeline(kind))
        settings = {"kind": kind, "path": case.folder, "precision": "fp32", **getattr(case.tiny, "SETTINGS", {})}
        given = [f"backbone.{name}={value}" for name, value in settings.items()]
        rewards = "rewards={size: {kind: jpeg}, clip: {kind: clip_score, role: monitor}}"
        config = load(TINY, [*given, "backbone.lora={rank: 3, alpha: 6}", rewards, f"name=tiny-{kind}"])
        run = RunDir.create(tmp_path_factory.mktemp("runs"), config.name)
        write_text(run.config, dump(config))
        backbone = case.backbone(lora={"rank": 3, "alpha": 6})
        denoiser = add_adapters(backbone, backbone.load_denoiser(), ("default",)).eval()
        backbone.save_lora(random_state(denoiser, 0.2), run.lora)
        record(run, config_hash(config))
        return Finished(case, run.path, backbone, denoiser)

    return make


def record(run: RunDir, digest: str) -> None:
    """Steps, grids and evaluations of a run."""
    rows = [{"task": "colors", "prompt_id": 0, "reward/size": -2.0}, {"task": "a|b", "prompt_id": 1, "reward/size": -1}]
    before, after = summarise(rows), summarise([row | {"reward/size": row["reward/size"] / 2} for row in rows])
    write_json(run.grid_prompts, [TEXT])
    with MetricWriter(run.path) as metrics:
        for step, scores in ((0, before), (2, after)):
            save_grid(np.full((2, 48, 48, 3), 60 * step, np.uint8), 2, run.grid(step), [TEXT])
            metrics.evaluation(step, step, "evaluation" if step else "base", scores)
        for step in (1, 2):
            metrics.write(step, {"reward/size/mean": step - 3.0})
    facts = {"name": run.path.name, "headline": "reward/size", "before": before, "after": after}
    write_json(run.summary, facts | {"config_hash": digest, "versions": {"torch": "x"}})


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A LoRA file of rank 4 for the embedded model with a scale of its own, large enough to change every image; and its
    weights."""
    sampler = Sampler(SD3.Config(lora={"rank": 4, "alpha": 8}))
    state = random_state(sampler.denoiser, 0.1)
    return sampler.backbone.save_lora(state, tmp_path_factory.mktemp("run") / "lora"), state
