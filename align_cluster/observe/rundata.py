"""Reads the files of a run directory into one record, for the report and the model card."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_cluster.checkpoint.store import MANIFEST, step_of
from align_cluster.errors import UserError
from align_cluster.files import read_json, read_text
from align_cluster.observe.charts import Point
from align_cluster.observe.metrics import describe
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import read_jsonl
from align_cluster.observe.table import headline_column
from align_cluster.plain import MAX_CHARACTERS, yaml_value


@dataclass
class RunData:
    """The content of a run's files. Everything but `name` may be missing.

    `rows` and `evaluations` hold one record a step, in order. `before` and `after` are the held-out scores of the base
    model and of the last evaluation, as `observe.table.summarise` returns them, with `by_prompt` where the run has it;
    `headline` is the column to show first. `checkpoints` are the steps of those in the run directory, and
    `timeline` says who worked when in the last step.
    """

    name: str
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    headline: str | None = None
    grids: list[tuple[int, Path]] = field(default_factory=list)
    grid_prompts: list[str] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    timeline: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def points(self, metric: str) -> list[Point]:
        """Return (step, value) of every step that wrote `metric`."""
        return [(row["step"], row[metric]) for row in self.rows if metric in row]

    def metrics(self, *prefixes: str) -> list[str]:
        """Return the names that begin with one of `prefixes`, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name.startswith(prefixes)))

    @property
    def tasks(self) -> list[str]:
        """The tasks of the held-out prompts, in order."""
        return list(dict.fromkeys([*self.before.get("tasks", {}), *self.after.get("tasks", {})]))

    @property
    def stages(self) -> list[str]:
        """The metric names of the stages that a step's time is divided into."""
        return [name for name in self.metrics("time/") if describe(name).pattern == "time/<stage>"]

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Total seconds by stage: the summary's, or the sum over the steps of a run that has none."""
        if "stage_seconds" in self.summary:
            return self.summary["stage_seconds"]
        return {name.removeprefix("time/"): sum(y or 0.0 for _, y in self.points(name)) for name in self.stages}


def load(files: RunDir) -> RunData:
    """Read a run directory. Without a summary, the first and the last evaluation stand for before and after.

    UserError where there is no such folder, or no run in it.
    """
    if not files.holds_a_run():
        raise UserError(
            f"{files.path} is not a run directory: give the folder that `train` made, such as runs/quickstart"
        )
    summary = read_json(files.summary) or {}
    evaluations = _last_of_each_step(read_jsonl(files.evaluations))
    first, last = (evaluations or [{}])[0], (evaluations[1:] or [{}])[-1]
    before, after = _fuller(summary.get("before"), first), _fuller(summary.get("after"), last)
    kept = [step_of(path.parent.name) for path in files.checkpoints.glob(f"*/{MANIFEST}")]
    config_text = read_text(files.config, MAX_CHARACTERS) if files.config.exists() else ""
    return RunData(
        name=str(summary.get("name", files.path.resolve().name)),
        config_text=config_text,
        config=yaml_value(config_text, str(files.config)) or {},
        rows=_last_of_each_step(read_jsonl(files.metrics)),
        evaluations=evaluations,
        summary=summary,
        before=before,
        after=after,
        headline=headline_column(summary.get("headline", first.get("headline")), list(before.get("overall", {}))),
        grids=[(step, files.grid(step)) for step in files.grid_steps()],
        grid_prompts=[str(prompt) for prompt in read_json(files.grid_prompts) or []],
        checkpoints=sorted(step for step in kept if step is not None),
        timeline=read_json(files.timeline) or {},
        error=(read_json(files.state) or {}).get("error"),
    )


def _fuller(told: dict[str, Any] | None, record: dict[str, Any]) -> dict[str, Any]:
    """Return the summary's scores, or the record of the same evaluation, which also has the scores by prompt."""
    return told if told and told.get("overall") != record.get("overall") else record


def _last_of_each_step(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort records by step and keep the last one of each: a resumed run repeats the steps after its checkpoint."""
    return list({record["step"]: record for record in sorted(records, key=lambda record: record["step"])}.values())
