"""Held-out evaluation and sample grids inside a run, with the run's own workers."""

from align_cluster.config.run import RunConfig
from align_cluster.files import write_json
from align_cluster.loop.workers import Crew, Sync
from align_cluster.observe.grids import save_grid
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import MetricWriter
from align_cluster.observe.table import headline_column, rows, summarise
from align_cluster.prompts.groups import plan_evaluation, spread
from align_cluster.rewards import REWARDS
from align_cluster.types import Prompt


class Evaluation:
    """The same held-out prompts and seeds every time, so that two evaluations differ by the weights alone."""

    def __init__(
        self, config: RunConfig, held_out: list[Prompt], crew: Crew, run: RunDir, metrics: MetricWriter
    ) -> None:
        self.settings, self.crew, self.run_dir, self.metrics = config.evaluate, crew, run, metrics
        self.steps = config.steps
        settings, seed = config.evaluate, config.seed
        self.chunks = plan_evaluation(
            held_out, settings.count, settings.images_per_prompt, settings.images_per_prompt, seed
        )
        shown = spread(held_out, min(settings.grid_prompts, settings.count))
        self.grid_chunks = plan_evaluation(shown, len(shown), settings.grid_columns, settings.grid_columns, seed + 1)
        write_json(run.grid_prompts, [chunk.prompt.text for chunk in self.grid_chunks])
        self.headline = headline(config)

    def due(self, step: int) -> bool:
        """Whether `between` has something to do after `step` steps; the last step is `last`'s."""
        every = (self.settings.every, self.settings.grid_every)
        return step < self.steps and any(turn and step % turn == 0 for turn in every)

    def first(self) -> dict:
        """Scores and grid of the base model, which the samplers hold from the start."""
        scores = self.score(0)
        self.grid(0)
        return scores

    def between(self, step: int) -> float | None:
        """What is due after `step` steps, and the headline score if it was taken; the samplers get the evaluation
        weights for it, and then their own again."""
        scores = None
        self.crew.report("evaluate", 0, 1)
        self.crew.publish("evaluation")
        if self.settings.every and step % self.settings.every == 0:
            scores = self.score(step)
        if self.settings.grid_every and step % self.settings.grid_every == 0:
            self.grid(step)
        self.crew.publish("behaviour")
        self.crew.report("evaluate", 1, 1)
        return scores["overall"].get(headline_column(self.headline, list(scores["overall"]))) if scores else None

    def last(self, step: int) -> tuple[Sync, dict]:
        """The weights that are kept, with their scores and grid."""
        sync = self.crew.publish("evaluation")
        scores = self.score(step)
        self.grid(step)
        return sync, scores

    def score(self, step: int) -> dict:
        """Scores of the weights that the samplers hold, recorded in evaluations.jsonl."""
        drawn, _ = self.crew.draw(self.chunks, self.crew.request(None))
        scores = summarise([row for item in drawn for row in rows(item.info.chunk.prompt, item.scores)])
        self.metrics.evaluation(step, self.crew.version, "evaluation" if step else "base", scores)
        return scores

    def grid(self, step: int) -> None:
        drawn, _ = self.crew.draw(self.grid_chunks, self.crew.request(None))
        captions = [chunk.prompt.text for chunk in self.grid_chunks]
        save_grid(self.crew.images(drawn), self.settings.grid_columns, self.run_dir.grid(step), captions)


def headline(config: RunConfig) -> str:
    """Return the column that is shown first: the first trained reward, or the detail that its class names."""
    name = config.trained[0]
    detail = REWARDS[config.rewards[name].kind].headline
    return f"reward/{name}/{detail}" if detail else f"reward/{name}"
