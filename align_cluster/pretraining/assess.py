"""Assess an embedded pipeline: `python -m align_cluster.pretraining.assess [--pipeline DIR] [--grid FILE]`.

It draws held-out prompts of every task with and without guidance, scores them with the GenEval rules at shape threshold
.80 (words with RapidOCR), and prints the table that stands in align_cluster/embedded/README.md.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from align_cluster.backbones import SD3
from align_cluster.config.plan import ROWS
from align_cluster.embedded import scene
from align_cluster.observe.grids import save_grid
from align_cluster.observe.table import rows, summarise
from align_cluster.prompts.groups import plan_evaluation, spread
from align_cluster.rewards import REWARDS
from align_cluster.rewards.worker import RewardWorker
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.rollouts.steps import Euler
from align_cluster.types import Prompt

IMAGES = 4  # a prompt


def held_out() -> list[Prompt]:
    """Return the held-out prompts of all tasks."""
    records = [record for task in scene.TASKS for record in scene.prompts(task, "held_out")]
    return [Prompt(number, record["prompt"], record) for number, record in enumerate(records)]


def assess(sampler: Sampler, guidance: float, count: int, steps: int, seed: int = 1) -> tuple[dict, np.ndarray, list]:
    """Draw images of `count` held-out prompts a task, and score them.

    Returns (scores of `observe.table.summarise`, images [N, H, W, 3], one prompt for every IMAGES images).
    """
    prompts = spread(held_out(), count * len(scene.TASKS))
    texts = [*dict.fromkeys(prompt.text for prompt in prompts), ""]
    conditions = dict(zip(texts, sampler.encode(texts), strict=True))
    judge = RewardWorker({"geneval": REWARDS["geneval"].Config(), "ocr": REWARDS["ocr"].Config()})
    request = DrawRequest(0, steps, Euler.Config(), guidance=guidance)
    table, images = [], []
    for chunk in plan_evaluation(prompts, len(prompts), IMAGES, ROWS, seed):
        _, drawn, _ = sampler.draw(chunk, conditions, conditions[""], request)
        table += rows(chunk.prompts, judge.score(drawn, chunk.prompts))
        images.append(drawn)
    return summarise(table), np.concatenate(images), prompts


def markdown(results: dict[float, dict]) -> str:
    """Return a table with accuracy / graded score for each task and guidance; words have exact readings / OCR score."""
    names = [f"guidance {guidance:g}" if guidance > 1 else "no guidance" for guidance in results]
    lines = ["| task | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for task in scene.TASKS:
        columns = ("ocr/exact", "ocr") if task == "ocr" else ("geneval/accuracy", "geneval/graded")
        cells = [
            " / ".join(f"{scores['tasks'][task][f'reward/{c}']:.2f}" for c in columns) for scores in results.values()
        ]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="embedded", help="folder of another embedded pipeline")
    parser.add_argument("--prompts", type=int, default=50, help="held-out prompts a task, four images each")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.5])
    parser.add_argument("--grid", type=Path, help="write a PNG with ten images of each task, at the last guidance")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sampler = Sampler(SD3.Config(path=args.pipeline, max_sequence_length=0))
    results = {}
    for guidance in args.guidance:
        results[guidance], images, prompts = assess(sampler, guidance, args.prompts, args.steps)
    print(markdown(results))
    if args.grid:
        shown = [index for task in scene.TASKS for index in [i for i, p in enumerate(prompts) if p.task == task][:10]]
        save_grid(images[[index * IMAGES for index in shown]], 10, args.grid, list(scene.TASKS), min_px=96)


if __name__ == "__main__":
    main()
