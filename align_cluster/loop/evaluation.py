"""Held-out evaluation and sample grids inside a run, with the run's own workers."""

from align_cluster.config.plan import evaluation_pieces
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.files import write_json
from align_cluster.loop.clock import Clock
from align_cluster.loop.learning import Sync
from align_cluster.loop.requests import evaluation_request
from align_cluster.loop.rollouts import DrawnChunk
from align_cluster.loop.workers import WorkerGroup
from align_cluster.observe.grids import save_grid
from align_cluster.observe.guards import no_score
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import MetricWriter
from align_cluster.observe.table import headline_column, rows, summarise
from align_cluster.prompts.groups import plan_evaluation, spread
from align_cluster.rewards import REWARDS
from align_cluster.rewards.mix import silent
from align_cluster.types import Chunk, Prompt


class Evaluation:
    """Scores the same held-out prompts and seeds every time, so that two evaluations differ by the weights alone."""

    def __init__(
        self,
        config: RunConfig,
        held_out: list[Prompt],
        workers: WorkerGroup,
        run: RunDir,
        metrics: MetricWriter,
        clock: Clock,
    ) -> None:
        self.config, self.settings, self.workers, self.clock = config, config.evaluate, workers, clock
        self.run_dir, self.metrics = run, metrics
        settings, seed = config.evaluate, config.seed
        batches = {"chunk": config.rollout.chunk, "pieces": evaluation_pieces(config)}
        self.chunks = plan_evaluation(held_out, settings.count, settings.images_per_prompt, seed=seed, **batches)
        shown = spread(held_out, min(settings.grid_prompts, settings.count))
        self.grid_chunks = plan_evaluation(shown, len(shown), settings.grid_columns, seed=seed + 1, **batches)
        self.captions = [prompt.text for prompt in shown]
        write_json(run.grid_prompts, self.captions)
        self.headline = headline(config)

    @property
    def images(self) -> int:
        """Return the number of images that are scored."""
        return sum(map(len, self.chunks))

    def first(self) -> dict:
        """Take scores and grid of the base model, which the samplers hold from the start.

        Raises UserError with the error of a trained reward that fails on every image.
        """
        with self.clock.stage("evaluate"):
            drawn = self._draw(self.chunks)
            for name, failure in silent([item.scores for item in drawn], self.config.rewards).items():
                if self.config.rewards[name].on_failure.stop_after:
                    raise UserError(no_score(name, failure, "of the first evaluation"))
            scores = self._summarise(0, drawn)
            self.grid(0)
            return scores

    def between(self, step: int) -> float | None:
        """Do what is due after `step` steps and return the headline score, if it was taken. The last step is `last`'s.

        The samplers get the evaluation weights for it, and then their own again.
        """
        scored, drawn = (every and step % every == 0 for every in (self.settings.every, self.settings.grid_every))
        if step == self.config.steps or not (scored or drawn):
            return None
        with self.clock.stage("evaluate"):
            self.workers.weights.publish("evaluation")
            scores = self.score(step)["overall"] if scored else {}
            if drawn:
                self.grid(step)
            self.workers.weights.publish("behaviour")
            return scores.get(headline_column(self.headline, list(scores)))

    def last(self) -> tuple[Sync, dict]:
        """Publish the weights that are kept, and take their scores and grid."""
        with self.clock.stage("evaluate"):
            sync, step = self.workers.weights.publish("evaluation"), self.config.steps
            scores = self.score(step)
            self.grid(step)
            return sync, scores

    def score(self, step: int) -> dict:
        """Take scores of the weights that the samplers hold, and record them in evaluations.jsonl."""
        return self._summarise(step, self._draw(self.chunks))

    def _summarise(self, step: int, drawn: list[DrawnChunk]) -> dict:
        scores = summarise([row for item in drawn for row in rows(item.chunk.prompts, item.scores)])
        self.metrics.evaluation(step, self.workers.weights.version, "evaluation" if step else "base", scores)
        return scores

    def _draw(self, chunks: list[Chunk]) -> list[DrawnChunk]:
        self.workers.conditions.encode([prompt for chunk in chunks for prompt in chunk.prompts])
        request = evaluation_request(self.config, self.workers.weights.version)
        return self.workers.rollouts.draw(chunks, request).drawn

    def grid(self, step: int) -> None:
        """Draw the grid's prompts with the weights that the samplers hold, and write the picture."""
        drawn = self._draw(self.grid_chunks)
        images, columns = self.workers.rollouts.images(drawn), self.settings.grid_columns
        save_grid(images, columns, self.run_dir.grid(step), self.captions)
        self.metrics.grid(step)


def headline(config: RunConfig) -> str:
    """Return the column that is shown first: the first trained reward, or the detail that its class names."""
    name = config.trained[0]
    detail = REWARDS[config.rewards[name].kind].headline
    return f"reward/{name}/{detail}" if detail else f"reward/{name}"
