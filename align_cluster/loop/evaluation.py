"""Held-out evaluation and sample grids inside a run, with the run's own workers."""

from collections.abc import Callable
from dataclasses import replace

from align_cluster.config.plan import evaluation_pieces
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError, counted
from align_cluster.files import write_json
from align_cluster.loop.clock import Clock
from align_cluster.loop.requests import evaluation_request
from align_cluster.loop.rollouts import DrawnChunk
from align_cluster.loop.syncing import Sync
from align_cluster.loop.workers import WorkerGroup
from align_cluster.observe.grids import save_grid
from align_cluster.observe.guards import no_score
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import MetricWriter
from align_cluster.observe.table import by_prompt, headline_column, headline_score, rows, short, summarise
from align_cluster.prompts.groups import plan_evaluation, spread
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
        note: Callable[[str], None],
    ) -> None:
        self.config, self.settings, self.workers, self.clock = config, config.evaluate, workers, clock
        self.run_dir, self.metrics, self.note = run, metrics, note
        settings, seed = config.evaluate, config.seed
        batches = {"chunk": config.rollout.chunk, "pieces": evaluation_pieces(config)}
        self.chunks = plan_evaluation(held_out, settings.count, settings.images_per_prompt, seed=seed, **batches)
        shown = spread(held_out, min(settings.grid_prompts, settings.count))
        self.grid_chunks = [
            replace(chunk, number=len(self.chunks) + chunk.number)  # they are drawn with the others
            for chunk in plan_evaluation(shown, len(shown), settings.grid_columns, seed=seed + 1, **batches)
        ]
        self.captions = [prompt.text for prompt in shown]
        write_json(run.grid_prompts, self.captions)

    @property
    def images(self) -> int:
        """Return the number of images that are scored."""
        return sum(map(len, self.chunks))

    def first(self) -> dict:
        """Take scores and grid of the base model, which the samplers hold from the start.

        Raises UserError with the error of a trained reward that fails on every image.
        """
        with self.clock.stage("evaluate"):
            drawn = self._draw([*self.chunks, *self.grid_chunks])
            for name, failure in silent([item.scores for item in drawn], self.config.rewards).items():
                if self.config.rewards[name].on_failure.stop_after:
                    raise UserError(no_score(name, failure, "of the first evaluation"))
            return self._record(0, drawn)

    def between(self, step: int) -> float | None:
        """Do what is due after `step` steps and return the headline score, if it was taken. The last step is `last`'s.

        The samplers first finish the step that they draw; they get their own weights back with the next one.
        """
        scored, shown = (every and step % every == 0 for every in (self.settings.every, self.settings.grid_every))
        if step == self.config.steps or not (scored or shown):
            return None
        with self.clock.stage("evaluate"):
            self.workers.weights.publish("evaluation")
            scores = self._record(step, self._draw([*self.chunks * bool(scored), *self.grid_chunks * bool(shown)]))
            return headline_score(self.config.headline, scores.get("overall", {}))

    def last(self) -> tuple[Sync, dict]:
        """Publish the weights that are kept, and take their scores and grid."""
        with self.clock.stage("evaluate"):
            sync = self.workers.weights.publish("evaluation")
            return sync, self._record(self.config.steps, self._draw([*self.chunks, *self.grid_chunks]))

    def _draw(self, chunks: list[Chunk]) -> list[DrawnChunk]:
        self.workers.rollouts.rest()
        self.workers.conditions.encode([prompt for chunk in chunks for prompt in chunk.prompts])
        request = evaluation_request(self.config, self.workers.weights.version)
        return self.workers.rollouts.draw(chunks, request).drawn

    def _record(self, step: int, drawn: list[DrawnChunk]) -> dict:
        """Return the scores of what was drawn for them, and record them in evaluations.jsonl; write the grid, if drawn.

        Either may be missing from what was drawn.
        """
        scored = [item for item in drawn if item.chunk.number < len(self.chunks)]
        scores = {}
        if scored:
            images = [row for item in scored for row in rows(item.chunk.prompts, item.scores)]
            scores, adapter = summarise(images), "evaluation" if step else "base"
            facts = {"headline": self.config.headline, "by_prompt": by_prompt(images)}
            self.metrics.evaluation(step, self.workers.weights.version, adapter, scores | facts)
            overall = scores["overall"]
            if column := headline_column(self.config.headline, list(overall)):
                when = f"after {counted(step, 'step')}" if step else "before training"
                self.note(f"held-out {short(column)} {overall[column]:.3f} {when}")
        if shown := drawn[len(scored) :]:
            pictures = self.workers.rollouts.images(shown)
            save_grid(pictures, self.settings.grid_columns, self.run_dir.grid(step), self.captions)
            self.metrics.grid(step)
        return scores
