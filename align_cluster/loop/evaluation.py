"""Held-out evaluation and sample grids inside a run, with the run's own workers."""

import numpy as np

from align_cluster.config.run import RunConfig
from align_cluster.evaluate.table import summarise
from align_cluster.loop.crew import Crew, Drawn
from align_cluster.observe.grids import save_grid
from align_cluster.observe.rundir import RunDir, write_json
from align_cluster.observe.sinks import MetricWriter
from align_cluster.prompts.groups import plan_evaluation, spread
from align_cluster.types import Prompt


class Evaluation:
    """The same held-out prompts and seeds every time, so that two evaluations differ by the weights alone."""

    def __init__(
        self, config: RunConfig, held_out: list[Prompt], crew: Crew, run: RunDir, metrics: MetricWriter
    ) -> None:
        self.settings, self.crew, self.run_dir, self.metrics = config.evaluate, crew, run, metrics
        settings, seed = config.evaluate, config.seed
        self.chunks = plan_evaluation(
            held_out, settings.count, settings.images_per_prompt, settings.images_per_prompt, seed
        )
        shown = spread(held_out, min(settings.grid_prompts, settings.count))
        self.grid_chunks = plan_evaluation(shown, len(shown), settings.grid_columns, settings.grid_columns, seed + 1)
        write_json(run.grid_prompts, [chunk.prompt.text for chunk in self.grid_chunks])
        self.headline = headline(config)

    def due(self, step: int) -> bool:
        return any(every and step % every == 0 for every in (self.settings.every, self.settings.grid_every))

    def run(self, step: int) -> None:
        """What is due after `step` steps; the samplers hold the evaluation weights."""
        if self.settings.every and step % self.settings.every == 0:
            self.score(step)
        if self.settings.grid_every and step % self.settings.grid_every == 0:
            self.grid(step)

    def score(self, step: int) -> dict:
        """Scores of the weights that the samplers hold, recorded in evaluations.jsonl."""
        drawn, _ = self.crew.draw(self.chunks, self.crew.request(evaluation=True))
        scores = summarise([row for item in drawn for row in rows(item)])
        self.metrics.evaluation(step, self.crew.version, "evaluation" if step else "base", scores)
        return scores

    def grid(self, step: int) -> None:
        drawn, _ = self.crew.draw(self.grid_chunks, self.crew.request(evaluation=True))
        captions = [chunk.prompt.text for chunk in self.grid_chunks]
        save_grid(self.crew.images(drawn), self.settings.grid_columns, self.run_dir.grid(step), captions)


def headline(config: RunConfig) -> str:
    """The score that is shown first: the first trained reward, its graded part where it is a GenEval one."""
    name, reward = next((name, reward) for name, reward in config.rewards.items() if reward.role == "train")
    return f"reward/{name}/graded" if reward.kind == "geneval" else f"reward/{name}"


def rows(item: Drawn) -> list[dict]:
    """One row an image for `evaluate.table`: task, prompt and every score column, None where it failed."""
    prompt, scores = item.info.chunk.prompt, item.scores
    columns = {f"reward/{name}": np.where(scores.valid[name], values, np.nan) for name, values in scores.values.items()}
    columns |= {f"reward/{name}": values for name, values in scores.details.items()}
    return [
        {"task": prompt.task, "prompt_id": prompt.id} | {name: _score(values[i]) for name, values in columns.items()}
        for i in range(len(item.info.chunk.seeds))
    ]


def _score(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
