"""Images of the base model and of finished runs, drawn in this process, that claims of the papers need."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from align_cluster.backbones.lora_file import Lora, read_lora
from align_cluster.config.load import load
from align_cluster.config.run import RunConfig
from align_cluster.evaluate.local import LocalModel
from align_cluster.evaluate.lora import find_lora
from align_cluster.observe.table import by_prompt
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.groups import plan_evaluation
from align_cluster.rewards.clip_score import ClipScore
from align_cluster.types import Chunk

IN_PROCESS = "cluster.threads=1"


def prompted(file: Path, settings: list[str], phrase: str) -> list[dict]:
    """Return {task: {column: {prompt: mean score}}} of the base model on held-out prompts: as they are, and worded.

    The worded ones have the phrase behind them. Both are scored as the plain prompts.
    """
    model, chunks = held_out(load(file, [*settings, IN_PROCESS]))

    def worded(chunk: Chunk) -> tuple:
        rows = [replace(row, prompt=replace(row.prompt, text=f"{row.prompt.text} {phrase}")) for row in chunk.rows]
        chunk = replace(chunk, rows=tuple(rows))
        model.conditions |= zip(chunk.texts, model.sampler.encode(chunk.texts), strict=True)
        return model.draw_unsteered(chunk)

    return [
        by_prompt([row for drawn in model.draw(chunks, "drawing", how) for row in drawn.rows]) for how in (None, worded)
    ]


def diversity(run: Path) -> list[list[float]]:
    """Return the distance of images of each held-out prompt, for the base model and for the LoRA of a run.

    It is the mean of 1 - cos between the embeddings of two images of the prompt, by the run's CLIP.
    """
    config = load(run / "config.yaml", [IN_PROCESS])
    judge, found = ClipScore(config.rewards["clip"]), []
    judge.load("cpu", 1)
    for lora in (None, read_lora(find_lora(run))):
        model, chunks = held_out(config, lora)
        images = np.concatenate([drawn.images for drawn in model.draw(chunks, "drawing")])
        pixels = torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2)
        with torch.no_grad():
            seen = torch.nn.functional.normalize(judge.see(pixels), dim=1)
        found.append([float(f"{value:.4g}") for value in apart(seen.view(config.evaluate.count, -1, seen.shape[1]))])
    return found


def apart(seen: torch.Tensor) -> torch.Tensor:
    """Return the mean distance 1 - cos [P] between two different unit vectors of [P, M, D]."""
    size = seen.shape[1]
    return 1 - (seen.sum(1).square().sum(1) - size) / (size * (size - 1))


def held_out(config: RunConfig, lora: Lora | None = None) -> tuple[LocalModel, list[Chunk]]:
    """Return the model in this process, and the chunks of its evaluation."""
    model, settings = LocalModel(config, lora), config.evaluate
    model.bind()
    prompts = PROMPTS[settings.prompts.kind](settings.prompts).load()
    return model, plan_evaluation(prompts, settings.count, settings.images_per_prompt, 32, config.seed)
