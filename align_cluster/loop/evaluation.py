"""Held-out evaluation and sample grids inside a run, with the run's own workers."""

from align_cluster.config.run import RunConfig
from align_cluster.files import write_json
from align_cluster.loop.learning import Sync
from align_cluster.loop.requests import evaluation_request
from align_cluster.loop.rollouts import DrawnChunk
from align_cluster.loop.workers import WorkerGroup
from align_cluster.observe.grids import save_grid
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import MetricWriter
from align_cluster.observe.table import headline_column, rows, summarise
from align_cluster.prompts.groups import plan_evaluation, spread
from align_cluster.rewards import REWARDS
from align_cluster.types import Chunk, Prompt


class Evaluation:
    """Scores the same held-out prompts and seeds every time, so that two evaluations differ by the weights alone."""

    def __init__(
        self, config: RunConfig, held_out: list[Prompt], workers: WorkerGroup, run: RunDir, metrics: MetricWriter
    ) -> None:
        self.config, self.settings, self.workers = config, config.evaluate, workers
        self.run_dir, self.metrics, self.steps = run, metrics, config.steps
        settings, seed = config.evaluate, config.seed
        self.chunks = plan_evaluation(
            held_out, settings.count, settings.images_per_prompt, settings.images_per_prompt, seed
        )
        shown = spread(held_out, min(settings.grid_prompts, settings.count))
        self.grid_chunks = plan_evaluation(shown, len(shown), settings.grid_columns, settings.grid_columns, seed + 1)
        write_json(run.grid_prompts, [chunk.prompt.text for chunk in self.grid_chunks])
        self.headline = headline(config)

    def due(self, step: int) -> bool:
        """Tell whether `between` has something to do after `step` steps. The last step belongs to `last`."""
        every = (self.settings.every, self.settings.grid_every)
        return step < self.steps and any(interval and step % interval == 0 for interval in every)

    def first(self) -> dict:
        """Take scores and grid of the base model, which the samplers hold from the start."""
        scores = self.score(0)
        self.grid(0)
        return scores

    def between(self, step: int) -> float | None:
        """Do what is due after `step` steps and return the headline score, if it was taken.

        The samplers get the evaluation weights for it, and then their own again.
        """
        scores = None
        self.workers.report("evaluate", 0, 1)
        self.workers.weights.publish("evaluation")
        if self.settings.every and step % self.settings.every == 0:
            scores = self.score(step)
        if self.settings.grid_every and step % self.settings.grid_every == 0:
            self.grid(step)
        self.workers.weights.publish("behaviour")
        self.workers.report("evaluate", 1, 1)
        return scores["overall"].get(headline_column(self.headline, list(scores["overall"]))) if scores else None

    def last(self, step: int) -> tuple[Sync, dict]:
        """Publish the weights that are kept, and take their scores and grid."""
        sync = self.workers.weights.publish("evaluation")
        scores = self.score(step)
        self.grid(step)
        return sync, scores

    def score(self, step: int) -> dict:
        """Take scores of the weights that the samplers hold, and record them in evaluations.jsonl."""
        drawn = self._draw(self.chunks)
        scores = summarise([row for item in drawn for row in rows(item.info.chunk.prompt, item.scores)])
        self.metrics.evaluation(step, self.workers.weights.version, "evaluation" if step else "base", scores)
        return scores

    def _draw(self, chunks: list[Chunk]) -> list[DrawnChunk]:
        request = evaluation_request(self.config, self.workers.weights.version)
        return self.workers.rollouts.draw(chunks, request).drawn

    def grid(self, step: int) -> None:
        """Draw the grid's prompts with the weights that the samplers hold, and write the picture."""
        drawn = self._draw(self.grid_chunks)
        captions = [chunk.prompt.text for chunk in self.grid_chunks]
        save_grid(self.workers.rollouts.images(drawn), self.settings.grid_columns, self.run_dir.grid(step), captions)


def headline(config: RunConfig) -> str:
    """Return the column that is shown first: the first trained reward, or the detail that its class names."""
    name = config.trained[0]
    detail = REWARDS[config.rewards[name].kind].headline
    return f"reward/{name}/{detail}" if detail else f"reward/{name}"
