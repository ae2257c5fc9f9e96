"""Images of given prompts in a new folder: PNG files, an overview, and samples.json with their seeds and scores."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from align_cluster.backbones.lora_file import Lora
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.evaluate.local import DrawnChunk, LocalModel
from align_cluster.evaluate.steer import SavedCritic, SteeredDrawing
from align_cluster.files import new_folder, write_json
from align_cluster.observe.grids import save_grid
from align_cluster.observe.table import KEYS, short
from align_cluster.prompts.files import JsonlPrompts, TextPrompts, read_lines
from align_cluster.prompts.groups import EVALUATION_STEP, cut, member_seed
from align_cluster.rollouts.steering import BATCH, Steering
from align_cluster.texts import fault
from align_cluster.types import Chunk, Prompt, Row


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Says what to draw: `count` images of each prompt, from noise that `seed` decides.

    `steps` and `guidance` are by default those of the run's evaluation. `compare` also draws the base model from the
    same noise. `score` lets the run's rewards score the images. `steer` holds the settings of a steering mode, which
    follows `critic`.
    """

    prompts: list[Prompt]
    count: int = 4
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    compare: bool = False
    score: bool = True
    steer: Steering.Config | None = None
    critic: SavedCritic | None = None


def read_prompts(texts: list[str], file: str | None) -> list[Prompt]:
    """Read prompts from the command line and from a file, which has one a line (.txt) or JSON lines (.jsonl).

    Raises UserError where there is no prompt, and for an empty line, which would shift the numbers of all images after
    it.
    """
    for text in texts:
        if problem := fault(text):
            raise UserError(f"--prompt {text!r} {problem}; write what to draw")
    prompts = [Prompt(index, text) for index, text in enumerate(texts)]
    if file:
        numbers = [number for number, _ in read_lines(file)]
        if numbers[-1] > len(numbers):
            empty = next(number for number in range(1, numbers[-1]) if number not in numbers)
            raise UserError(f"prompt file {file}, line {empty} is empty; delete the line, or write a prompt there")
        reader = JsonlPrompts if file.endswith(".jsonl") else TextPrompts
        prompts += reader(reader.Config(path=file)).load()
    if not prompts:
        raise UserError('sample needs prompts; give --prompt "a photo of a red circle" or --prompts FILE')
    return prompts


def sample(config: RunConfig, lora: Lora | None, request: SampleRequest, out: Path) -> dict[str, Any]:
    """Draw the requested images into the new folder `out`, and return what samples.json there says.

    Image 002_01.png is member 1 of prompt 2; where both models are drawn, 002_01_base.png is the base model's. One seed
    gives the same noise with any LoRA, so two folders compare image by image. The n tries for steered image m are the
    members m n to m n + n - 1 of plain sampling. Raises UserError before anything is drawn where the request cannot
    work, and leaves no folder after any error.
    """
    if request.count < 1:
        raise UserError(f"--count {request.count} must be at least 1")
    if request.compare and lora is None:
        raise UserError("--compare base needs a LoRA to compare with the base; name a run that has finished, or --lora")
    with new_folder(out) as folder:
        model = LocalModel(config, lora, steps=request.steps, guidance=request.guidance, score=request.score)
        steered = None
        if request.steer:
            steered = SteeredDrawing(model, request.steer, request.critic)
            steered.check(request.prompts)
        images, entries = {}, {}
        if request.compare:
            drawn = model.draw(plan(request), "drawing base")
            images["base"], entries["base"] = write_images(folder, "base", drawn, ending="_base")
        model.bind()
        name = "steered" if steered else "aligned" if lora else "base"
        drawn = model.draw(plan(request, request.steer), f"drawing {name}", steered.draw if steered else None)
        images[name], entries[name] = write_images(folder, name, drawn)
        _write_overview(folder, request, images)
        facts = {
            "backbone": config.backbone.path,
            "lora": str(lora.path) if lora else None,
            "steps": model.steps,
            "guidance": model.guidance,
            "seed": request.seed,
            "means": {name: _means(listed) for name, listed in entries.items()},
            "failures": model.failures,
            "images": [entry for listed in entries.values() for entry in listed],
        }
        if steered:
            facts["steer"] = steered.report()
        write_json(folder / "samples.json", facts)
    return facts


def plan(request: SampleRequest, steer: Steering.Config | None = None) -> list[Chunk]:
    """Plan the chunks of a request. A steered chunk has one prompt, and all the tries for one image if there are any.

    A member's seed depends on the request's seed, its prompt's place and its own number alone.
    """
    tries = steer.tries if steer else None
    rows, members = [], request.count * (tries or 1)
    for group, prompt in enumerate(request.prompts):
        for member in range(members):
            seed = member_seed(request.seed, EVALUATION_STEP, group, member)
            rows.append(Row(prompt, group, member, seed, seed))
    return cut(EVALUATION_STEP, rows, tries or BATCH, range(0, len(rows), members) if steer else ())


def write_images(
    folder: Path, model: str, drawn: Iterable[DrawnChunk], ending: str = ""
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Write images as PNG files while they are drawn.

    Returns all of them [B, H, W, 3] and an entry of samples.json for each: file, model, prompt, facts and scores.
    """
    numbers: defaultdict[int, count] = defaultdict(count)  # the next image of each prompt
    images, entries = [], []
    for one in drawn:
        for index, image in enumerate(one.images):
            row = one.chunk.rows[index]
            file = f"{row.group:03d}_{next(numbers[row.group]):02d}{ending}.png"
            Image.fromarray(image).save(folder / file)
            entry = {"file": file, "model": model, "prompt": row.prompt.text, **one.facts[index]}
            if one.rows:
                scores = {column: score for column, score in one.rows[index].items() if column not in KEYS}
                entry["scores"] = {short(column): score for column, score in scores.items()}
            entries.append(entry)
        images.append(one.images)
    return np.concatenate(images), entries


def _write_overview(folder: Path, request: SampleRequest, images: dict[str, np.ndarray]) -> None:
    """Write grid.png: one row a prompt, the models [B, H, W, 3] side by side."""
    sides = [array.reshape(len(request.prompts), request.count, *array.shape[1:]) for array in images.values()]
    side_by_side = np.concatenate(sides, axis=1)
    captions, titles = [prompt.text for prompt in request.prompts], list(images) if request.compare else []
    grid = side_by_side.reshape(-1, *side_by_side.shape[2:])
    save_grid(grid, side_by_side.shape[1], folder / "grid.png", captions, titles=titles)


def _means(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of each score over the images that have it."""
    columns: defaultdict[str, list[float]] = defaultdict(list)
    for entry in entries:
        for column, score in entry.get("scores", {}).items():
            columns[column] += [] if score is None else [score]
    return {column: float(np.mean(scores)) for column, scores in columns.items() if scores}
