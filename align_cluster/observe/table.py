"""Tables of held-out scores hold means per task and the overall score with its uncertainty, before and after."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from align_cluster.errors import counted
from align_cluster.types import Prompt, Scores

KEYS = ("task", "prompt_id")
RESAMPLES = 2000  # of a bootstrap: the ends of its interval wobble by a fiftieth of its width
FEW = 5  # prompts of a task below which their spread says too little for an interval of a change
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


def summarise(rows: list[dict[str, Any]], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
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
    columns, tasks = _per_prompt(rows)
    rng = np.random.default_rng(seed)
    means = {name: _divide(sums.sum(0), counts.sum(0)) for name, (_, sums, counts) in tasks.items()}
    redrawn = [_redraw(sums, counts, resamples, rng) for _, sums, counts in tasks.values()]
    return {
        "overall": _defined(columns, _mean_of_tasks(np.stack(list(means.values())))),
        "tasks": {name: _defined(columns, mean) for name, mean in means.items()},
        "interval": _intervals(columns, _mean_of_tasks(np.stack(redrawn))),
        "count": len(rows),
        "prompts": sum(len(prompts) for prompts, _, _ in tasks.values()),
    }


def by_prompt(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return {task: {column: {prompt: mean over its images}}} of the rows that `summarise` takes, with six digits.

    Two evaluations of the same prompts and noises are compared by it prompt by prompt.
    """
    columns, tasks = _per_prompt(rows)
    found = {}
    for task, (prompts, sums, counts) in tasks.items():
        means = zip(columns, _divide(sums, counts).T, strict=True)
        found[task] = {column: _defined(prompts, [float(f"{one:.6g}") for one in mean]) for column, mean in means}
    return found


def paired(before: dict[str, Any], after: dict[str, Any], resamples: int = RESAMPLES) -> dict[str, Any]:
    """Return 95 % bootstrap intervals of the change between two evaluations, from what `by_prompt` gave of each.

    Each prompt's own change is redrawn, so how much prompts differ from each other does not widen them. They are
    {"overall": {column: [low, high]}, "tasks": {task: {column: [low, high]}}}. A task in which a column has under FEW
    prompts has no interval of it, and then neither has the column's overall change.
    """
    tasks = [task for task in before if task in after]
    columns = list(dict.fromkeys(column for task in tasks for column in before[task]))
    rng, spreads, few = np.random.default_rng(0), {}, np.zeros(len(columns), dtype=bool)
    for task in tasks:
        prompts = list(dict.fromkeys(prompt for means in before[task].values() for prompt in means))
        means = [[[side[task].get(c, {}).get(p, np.nan) for c in columns] for p in prompts] for side in (before, after)]
        old, new = np.array(means).reshape(2, -1, len(columns))
        known = np.isfinite(new - old)
        if known.any():
            small = known.sum(axis=0) < FEW
            few |= small & known.any(axis=0)
            spread = _redraw(np.nan_to_num(new - old), known.astype(float), resamples, rng)
            spreads[task] = np.where(small, np.nan, spread)
    if not spreads:
        return {"overall": {}, "tasks": {}}
    overall = _mean_of_tasks(np.stack(list(spreads.values())))
    return {
        "overall": _intervals(columns, np.where(few, np.nan, overall)),
        "tasks": {task: _intervals(columns, spread) for task, spread in spreads.items()},
    }


def _per_prompt(rows: list[dict[str, Any]]) -> tuple[list[str], dict[str, tuple[list[str], np.ndarray, np.ndarray]]]:
    """Return the C score columns, and by task its P prompts with sums and counts [P, C] of their defined scores."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in KEYS))
    scores = np.array([[np.nan if row.get(c) is None else row[c] for c in columns] for row in rows], dtype=np.float64)
    tasks = np.array([row["task"] for row in rows])
    prompts = np.array([str(row["prompt_id"]) for row in rows])
    found = {}
    for task in dict.fromkeys(tasks.tolist()):
        keys, owner = np.unique(prompts[tasks == task], return_inverse=True)
        sums, counts = np.zeros((2, len(keys), len(columns)))
        np.add.at(sums, owner, np.nan_to_num(scores[tasks == task]))
        np.add.at(counts, owner, np.isfinite(scores[tasks == task]))
        found[task] = (keys.tolist(), sums, counts)
    return columns, found


def _redraw(sums: np.ndarray, counts: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the means [R, C] of P prompts, with sums and counts [P, C], drawn R times with replacement."""
    size = len(sums)
    draws = rng.multinomial(size, np.full(size, 1 / size), size=resamples).astype(np.float64)
    return _divide(draws @ sums, draws @ counts)


def _intervals(columns: list[str], spread: np.ndarray) -> dict[str, list[float]]:
    """Return the middle 95 % of each column of [R, C] that has a value."""
    there = np.isfinite(spread).any(axis=0)
    return {
        column: np.nanpercentile(spread[:, index], (2.5, 97.5)).tolist()
        for index, column in enumerate(columns)
        if there[index]
    }


def _divide(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return sums / counts, with NaN where a count is 0."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _mean_of_tasks(means: np.ndarray) -> np.ndarray:
    """Average over axis 0, the tasks, leaving out tasks without a score."""
    return _divide(np.nansum(means, axis=0), np.isfinite(means).sum(axis=0))


def _defined(names: list[str], means: Sequence[float] | np.ndarray) -> dict[str, float]:
    return {name: float(mean) for name, mean in zip(names, means, strict=True) if np.isfinite(mean)}


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Put two summaries side by side, with a cell {"before", "after", "change", "interval"} for each score.

    Returns {"overall": {column: cell}, "tasks": {task: {column: cell}}}. A side without the score has None there, and
    the change is None. The interval is the change's, `paired` by prompt; it is None unless both summaries have
    "by_prompt" beside what `summarise` returns.
    """
    tasks = list(dict.fromkeys([*before.get("tasks", {}), *after.get("tasks", {})]))
    sides = (before.get("tasks", {}), after.get("tasks", {}))
    bounds = paired(*(side.get("by_prompt", {}) for side in (before, after)))
    return {
        "overall": _cells(before.get("overall", {}), after.get("overall", {}), bounds["overall"]),
        "tasks": {t: _cells(*(side.get(t, {}) for side in sides), bounds["tasks"].get(t, {})) for t in tasks},
    }


def _cells(
    before: dict[str, float], after: dict[str, float], bounds: dict[str, list[float]]
) -> dict[str, dict[str, Any]]:
    cells = {}
    for column in dict.fromkeys([*before, *after]):
        old, new = before.get(column), after.get(column)
        change = None if old is None or new is None else new - old
        cells[column] = {"before": old, "after": new, "change": change, "interval": bounds.get(column)}
    return cells


def within_noise(cell: dict[str, Any]) -> bool | None:
    """Return whether a cell's change may be none, since its interval holds 0; None where it has no interval."""
    return cell["interval"] and cell["interval"][0] <= 0 <= cell["interval"][1]


def headline_column(wanted: str | None, columns: list[str]) -> str | None:
    """Return the column to show first: `wanted`, with or without its "reward/", or else the first there is."""
    for name in (wanted, f"reward/{wanted}"):
        if name in columns:
            return name
    return columns[0] if columns else None


def headline_score(wanted: str, overall: Mapping[str, float]) -> float | None:
    """Return the score in the column that is shown first, of means by column; None where there is none."""
    return overall.get(headline_column(wanted, list(overall)))


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


def _shown(cell: dict[str, Any] | None) -> tuple[str, str, str]:
    """Return both sides and the change as text, whose colour says better or worse where it is no noise."""
    if cell is None:
        return "–", "–", "–"
    change = "–" if cell["change"] is None else f"{cell['change']:+.3f}"
    if within_noise(cell):
        change += " within the noise"
    elif cell["interval"]:
        change = f"[{'green' if cell['change'] > 0 else 'red'}]{change}[/]"
    return _score(cell["before"]), _score(cell["after"]), change
