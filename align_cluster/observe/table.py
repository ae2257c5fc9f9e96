"""Tables of held-out scores hold means per task and the overall score with its uncertainty, before and after."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from align_cluster.errors import counted
from align_cluster.types import Prompt, Scores

KEYS = ("task", "prompt_id")
_UNBOUNDED = Console(width=10_000)


def rows(prompts: Sequence[Prompt], scores: Scores) -> list[dict[str, Any]]:
    """Return one row an image for `summarise`: task, prompt and every score column, None where there is no score."""
    columns = {f"reward/{name}": np.where(scores.valid[name], values, np.nan) for name, values in scores.values.items()}
    columns |= {f"reward/{name}": values for name, values in scores.details.items()}
    return [
        {"task": prompt.task, "prompt_id": prompt.id}
        | {name: float(values[i]) if np.isfinite(values[i]) else None for name, values in columns.items()}
        for i, prompt in enumerate(prompts)
    ]


def summarise(rows: list[dict[str, Any]], resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Average the score columns of per-image rows {"task", "prompt_id", column: float or None}.

    Returns {"overall": {column: mean}, "tasks": {task: {column: mean}}, "interval": {column: [low, high]}, "count":
    images, "prompts": distinct prompts}. A task's mean is over its images; `overall` is the mean of the task means
    (GenEval's convention), so a task counts the same however many prompts it has. A failed score (None or NaN) is left
    out, never counted as zero; a column without any score in a task is absent there, and that task does not enter the
    column's overall score.

    `interval` is the 95 % bootstrap interval of `overall`: prompts are redrawn with replacement inside each task, with
    all of a prompt's images, since images of one prompt are not independent. ValueError for no rows.
    """
    if not rows:
        raise ValueError("a table of no images: there is nothing to summarise")
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in KEYS))
    scores = np.array([[np.nan if row.get(c) is None else row[c] for c in columns] for row in rows], dtype=np.float64)
    tasks = np.array([row["task"] for row in rows])
    prompts = np.array([str(row["prompt_id"]) for row in rows])
    rng = np.random.default_rng(seed)

    names = list(dict.fromkeys(tasks.tolist()))
    means, redrawn, distinct = [], [], 0
    for name in names:
        sums, counts = _per_prompt(scores[tasks == name], prompts[tasks == name])
        size = len(sums)
        distinct += size
        draws = rng.multinomial(size, np.full(size, 1 / size), size=resamples).astype(np.float64)
        means.append(_divide(sums.sum(0), counts.sum(0)))
        redrawn.append(_divide(draws @ sums, draws @ counts))
    overall = _mean_of_tasks(np.stack(means))
    spread = _mean_of_tasks(np.stack(redrawn))
    return {
        "overall": _defined(columns, overall),
        "tasks": {name: _defined(columns, mean) for name, mean in zip(names, means, strict=True)},
        "interval": {
            column: np.nanpercentile(spread[:, index], (2.5, 97.5)).tolist()
            for index, column in enumerate(columns)
            if np.isfinite(overall[index])
        },
        "count": len(rows),
        "prompts": distinct,
    }


def _per_prompt(scores: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sums and counts [P, C] of the defined ones among the scores [B, C] of P prompts."""
    keys, owner = np.unique(prompts, return_inverse=True)
    sums, counts = np.zeros((2, len(keys), scores.shape[1]))
    np.add.at(sums, owner, np.nan_to_num(scores))
    np.add.at(counts, owner, np.isfinite(scores))
    return sums, counts


def _divide(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return sums / counts, with NaN where a count is 0."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _mean_of_tasks(means: np.ndarray) -> np.ndarray:
    """Average over axis 0, the tasks, leaving out tasks without a score."""
    return _divide(np.nansum(means, axis=0), np.isfinite(means).sum(axis=0))


def _defined(columns: list[str], means: np.ndarray) -> dict[str, float]:
    return {column: float(mean) for column, mean in zip(columns, means, strict=True) if np.isfinite(mean)}


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Put two summaries side by side, with a cell {"before", "after", "change"} for each score.

    Returns {"overall": {column: cell}, "tasks": {task: {column: cell}}}. A side without the score has None there, and
    the change is None.
    """
    tasks = list(dict.fromkeys([*before.get("tasks", {}), *after.get("tasks", {})]))
    sides = (before.get("tasks", {}), after.get("tasks", {}))
    return {
        "overall": _cells(before.get("overall", {}), after.get("overall", {})),
        "tasks": {task: _cells(*(side.get(task, {}) for side in sides)) for task in tasks},
    }


def _cells(before: dict[str, float], after: dict[str, float]) -> dict[str, dict[str, float | None]]:
    cells = {}
    for column in dict.fromkeys([*before, *after]):
        old, new = before.get(column), after.get(column)
        cells[column] = {"before": old, "after": new, "change": None if old is None or new is None else new - old}
    return cells


def headline_column(wanted: str | None, columns: list[str]) -> str | None:
    """Return the column to show first: `wanted`, with or without its "reward/", or else the first there is."""
    for name in (wanted, f"reward/{wanted}"):
        if name in columns:
            return name
    return columns[0] if columns else None


def short(column: str | None) -> str:
    """Return the name of a score column without the "reward/" that all of them share."""
    return (column or "").removeprefix("reward/")


def evaluation_tables(scores: dict[str, Any], width: int, title: str = "held-out scores") -> Group:
    """Show what `summarise` returned in a terminal of `width` columns: one row a task, one column a score.

    Scores that do not fit beside each other go into further tables below.
    """
    parts: list[list[str]] = [[]]
    for column in scores["overall"]:
        if parts[-1] and measure(_evaluation_table(scores, [*parts[-1], column])) > width:
            parts.append([])
        parts[-1].append(column)
    tables = [_evaluation_table(scores, columns) for columns in parts]
    tables[0].title, tables[-1].caption = title, _caption(scores)
    return Group(*tables)


def measure(table: Table) -> int:
    """Return the columns of a terminal that a table wants."""
    return Measurement.get(_UNBOUNDED, _UNBOUNDED.options, table).maximum


def _evaluation_table(scores: dict[str, Any], columns: list[str]) -> Table:
    table = Table(title_justify="left", caption_justify="left")
    table.add_column("task")
    for column in columns:
        table.add_column(short(column), justify="right")
    for task, means in scores["tasks"].items():
        table.add_row(escape(task), *(_score(means.get(column)) for column in columns))
    table.add_section()
    table.add_row("overall", *(_score(scores["overall"][column]) for column in columns), style="bold")
    if "interval" in scores:
        bounds = (scores["interval"][column] for column in columns)
        table.add_row("95 % interval", *(f"{low:.3f} – {high:.3f}" for low, high in bounds), style="dim")
    return table


def comparison_table(before: dict[str, Any], after: dict[str, Any], column: str, title: str | None = None) -> Table:
    """Show one score before and after in the terminal: one row a task, and overall."""
    cells = compare(before, after)
    table = Table(title=title or short(column), title_justify="left")
    for name in ("task", "before", "after", "change"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, row in cells["tasks"].items():
        table.add_row(escape(task), *_shown(row.get(column)))
    table.add_section()
    table.add_row("overall", *_shown(cells["overall"].get(column)), style="bold")
    return table


def _caption(scores: dict[str, Any]) -> str:
    prompts = f" of {counted(scores['prompts'], 'prompt')}" if "prompts" in scores else ""
    return f"{counted(scores['count'], 'image')}{prompts}; overall is the mean of the task means"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _shown(cell: dict[str, float | None] | None) -> tuple[str, str, str]:
    if cell is None:
        return "–", "–", "–"
    change = cell["change"]
    if change is None:
        return _score(cell["before"]), _score(cell["after"]), "–"
    colour = "green" if change > 0 else "red" if change < 0 else "dim"
    return _score(cell["before"]), _score(cell["after"]), f"[{colour}]{change:+.3f}[/]"
