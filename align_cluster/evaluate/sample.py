"""Draw images of given prompts into a folder: PNG files, an overview, and a JSON file with their seeds and scores."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.evaluate.lora import base_sampler, bind, read_lora
from align_cluster.evaluate.run import encode, progress
from align_cluster.evaluate.steer import SavedCritic, Steered
from align_cluster.files import new_folder, write_json
from align_cluster.observe.grids import save_grid
from align_cluster.observe.table import KEYS, rows, short
from align_cluster.prompts.files import JsonlPrompts, TextPrompts, read_lines
from align_cluster.prompts.groups import EVALUATION_STEP, member_seed
from align_cluster.rewards.worker import RewardWorker
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.rollouts.steering import BATCH
from align_cluster.rollouts.steps import Euler
from align_cluster.settings import Section
from align_cluster.types import Chunk, Condition, Prompt


@dataclass(frozen=True)
class Wanted:
    """How to draw. Steps and guidance that are None are the run's evaluation's; `compare` draws the base model too,
    from the same noise; `score` has the run's rewards judge the images. `steer` are settings of a mode of steering, by
    the critic of the run in the folder `run`."""

    count: int = 4
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    compare: bool = False
    score: bool = True
    steer: Section | None = None
    run: Path | None = None


def read_prompts(texts: list[str], file: str | None) -> list[Prompt]:
    """Prompts of the command line and of a file, one a line (.txt) or JSON lines. UserError for none, and for an empty
    line, which would shift the numbers of all images after it."""
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


def sample(config: RunConfig, lora: Path | None, prompts: list[Prompt], out: Path, wanted: Wanted) -> dict[str, Any]:
    """Draw `wanted.count` images of each prompt, with ODE steps or steered, into the new folder `out`; returns what
    samples.json there says.

    Image 002_01.png is member 1 of prompt 2; where both are drawn, 002_01_base.png is the base model's. The same seed
    draws the same noise with any LoRA, so two folders compare image by image. The n tries for steered image m are the
    members m n to m n + n - 1 of plain sampling.
    """
    default = config.evaluate.steps or config.rollout.steps
    steps = default if wanted.steps is None else wanted.steps
    guidance = config.evaluate.guidance if wanted.guidance is None else wanted.guidance
    if wanted.count < 1 or steps < 1 or guidance < 1:
        raise UserError(f"--count {wanted.count}, --steps {steps} and --guidance {guidance} must be at least 1")
    if wanted.compare and lora is None:
        raise UserError("--compare base needs a LoRA to compare with the base; name a run that has finished, or --lora")
    weights = read_lora(lora) if lora else None
    with new_folder(out) as folder:
        sampler = base_sampler(config.backbone, weights, config.cluster.threads)
        _ = sampler.backbone.latent_shape  # refuses a size that cannot be divided, before any weights are read
        steered = None
        if wanted.steer:
            saved = SavedCritic.read(wanted.run, config)
            steered = Steered(wanted.steer, saved, config, sampler, steps, guidance)
            steered.check(prompts, wanted.score)
        rewards = RewardWorker(dict(config.rewards), config.cluster.threads) if wanted.score else None
        conditions = encode(sampler, [prompt.text for prompt in prompts], guidance)
        studio = Studio(sampler, rewards, conditions, replace(wanted, steps=steps, guidance=guidance), folder)
        images = {}
        if wanted.compare:
            images["base"] = studio.draw(prompts, "base", "_base")
        if weights:
            bind(sampler, weights)
        model = "steered" if steered else "aligned" if weights else "base"
        images[model] = studio.draw(prompts, model, steered=steered)
        sides = [array.reshape(len(prompts), wanted.count, *array.shape[1:]) for array in images.values()]
        side_by_side = np.concatenate(sides, axis=1)
        titles = list(images) if wanted.compare else []
        captions = [prompt.text for prompt in prompts]
        grid = side_by_side.reshape(-1, *side_by_side.shape[2:])
        save_grid(grid, side_by_side.shape[1], folder / "grid.png", captions, titles=titles)
        facts = {
            "backbone": config.backbone.path,
            "lora": str(lora) if lora else None,
            "steps": steps,
            "guidance": guidance,
            "seed": wanted.seed,
            "means": {model: _means(studio.made, model) for model in images},
            "failures": studio.failures | (steered.failures if steered else {}),
            "images": studio.made,
        }
        if steered:
            facts["steer"] = steered.report(wanted.count * len(prompts))
        write_json(folder / "samples.json", facts)
    return facts


@dataclass
class Studio:
    """Draws, scores and writes images; `made` says which, `failures` why a reward has no score of some."""

    sampler: Sampler
    rewards: RewardWorker | None
    conditions: dict[str, Condition]
    wanted: Wanted
    folder: Path
    made: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def draw(self, prompts: list[Prompt], model: str, ending: str = "", steered: Steered | None = None) -> np.ndarray:
        """Images of all prompts [B, H, W, 3], drawn with the weights that the sampler holds."""
        request = DrawRequest(self.sampler.version, self.wanted.steps, Euler.Config(), guidance=self.wanted.guidance)
        drawn, tries = [], steered.tries if steered else None
        for chunk in progress(_chunks(prompts, self.wanted, tries), f"drawing {model}"):
            condition, null = self.conditions[chunk.prompt.text], self.conditions.get("")
            if steered:
                images, found = steered.draw(chunk, condition, null, self.rewards)
            else:
                _, images, _ = self.sampler.draw(chunk, condition, null, request)
                found = [{"seed": seed} for seed in chunk.seeds]
            scores = self._score(images, chunk.prompt)
            first = chunk.first // (tries or 1)
            for offset, (image, own) in enumerate(zip(images, found, strict=True)):
                file = f"{chunk.group:03d}_{first + offset:02d}{ending}.png"
                Image.fromarray(image).save(self.folder / file)
                facts = {"file": file, "model": model, "prompt": chunk.prompt.text, **own}
                self.made.append(facts | ({"scores": scores[offset]} if scores else {}))
            drawn.append(images)
        return np.concatenate(drawn)

    def _score(self, images: np.ndarray, prompt: Prompt) -> list[dict[str, float | None]]:
        """Scores of each image by column; None where a reward has none."""
        if not self.rewards:
            return []
        scores = self.rewards.score(images, [prompt] * len(images))
        self.failures.update({name: f"{one.kind}: {one.message}" for name, one in scores.failures.items()})
        columns = rows(prompt, scores)
        return [{short(name): value for name, value in row.items() if name not in KEYS} for row in columns]


def _means(made: list[dict[str, Any]], model: str) -> dict[str, float]:
    """Mean of each score over a model's images that have it."""
    scores = [one.get("scores", {}) for one in made if one["model"] == model]
    columns = dict.fromkeys(name for row in scores for name in row)
    known = {name: [row[name] for row in scores if row.get(name) is not None] for name in columns}
    return {name: float(np.mean(values)) for name, values in known.items() if values}


def _chunks(prompts: list[Prompt], wanted: Wanted, tries: int | None) -> list[Chunk]:
    """Batches of one prompt each, or of the `tries` for one image; a member's seed depends on its prompt's number and
    its own alone."""
    count, size = wanted.count * (tries or 1), tries or BATCH
    return [
        Chunk(EVALUATION_STEP, group, first, prompt, seeds[first : first + size])
        for group, prompt in enumerate(prompts)
        for seeds in [tuple(member_seed(wanted.seed, EVALUATION_STEP, group, one) for one in range(count))]
        for first in range(0, count, size)
    ]
