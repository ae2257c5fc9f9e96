"""Draw images of given prompts into a folder: PNG files, an overview, and a JSON file that says how they were made."""

from pathlib import Path

import numpy as np
from PIL import Image

from align_cluster.config.run import RunConfig
from align_cluster.evaluate.lora import sampler_with
from align_cluster.evaluate.run import encode, progress
from align_cluster.observe.grids import save_grid
from align_cluster.observe.rundir import write_json
from align_cluster.prompts.groups import EVALUATION_STEP, member_seed
from align_cluster.rollouts.sampler import DrawRequest
from align_cluster.rollouts.steps import Euler
from align_cluster.types import Chunk, Prompt, UserError

BATCH = 8


def sample(
    config: RunConfig,
    lora: Path | None,
    prompts: list[Prompt],
    out: Path,
    count: int,
    seed: int,
    steps: int,
    guidance: float,
) -> Path:
    """Draw `count` images of each prompt with the run's backbone and ODE steps; returns the overview, OUT/grid.png.

    Image 002_01.png is member 1 of prompt 2. The same seed draws the same noise with any LoRA, so two folders compare
    image by image.
    """
    if count < 1 or steps < 1 or guidance < 1:
        raise UserError(f"--count {count}, --steps {steps} and --guidance {guidance} must be at least 1")
    sampler = sampler_with(config.backbone, lora, config.cluster.threads)
    conditions = encode(sampler, [prompt.text for prompt in prompts], guidance)
    request = DrawRequest(sampler.version, steps, Euler.Config(), guidance)
    chunks = [
        Chunk(EVALUATION_STEP, group, first, prompt, _seeds(seed, group, first, count))
        for group, prompt in enumerate(prompts)
        for first in range(0, count, BATCH)
    ]
    out.mkdir(parents=True, exist_ok=True)
    drawn, files = [], []
    for chunk in progress(chunks, "drawing"):
        _, images, _ = sampler.draw(chunk, conditions[chunk.prompt.text], conditions.get(""), request)
        drawn.append(images)
        for offset, image in enumerate(images):
            file = f"{chunk.group:03d}_{chunk.first + offset:02d}.png"
            Image.fromarray(image).save(out / file)
            files.append({"file": file, "prompt": chunk.prompt.text, "seed": chunk.seeds[offset]})
    grid = out / "grid.png"
    save_grid(np.concatenate(drawn), count, grid, [prompt.text for prompt in prompts])
    facts = {
        "backbone": config.backbone.path,
        "lora": str(lora) if lora else None,
        "steps": steps,
        "guidance": guidance,
    }
    write_json(out / "samples.json", {**facts, "seed": seed, "images": files})
    return grid


def _seeds(seed: int, group: int, first: int, count: int) -> tuple[int, ...]:
    members = range(first, min(first + BATCH, count))
    return tuple(member_seed(seed, EVALUATION_STEP, group, member) for member in members)
