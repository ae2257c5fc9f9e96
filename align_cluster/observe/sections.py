"""The report's sections on scores, samples and provenance: a RunData in, HTML out, "" where there is nothing."""

import base64
import io
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from align_cluster.observe import charts
from align_cluster.observe.blocks import duration, facts_table, panel, short
from align_cluster.observe.charts import number
from align_cluster.observe.rundata import RunData
from align_cluster.observe.table import compare

GRID_WIDTH, GRID_BYTES = 1280, 1_500_000  # a larger grid is embedded smaller, as JPEG


def head(run: RunData) -> str:
    """Title, state, and the numbers that the run is about."""
    steps, planned = len(run.rows), run.config.get("steps")
    if run.summary:
        state = '<span class="pill good">finished</span>'
    else:
        state = f'<span class="pill bad">unfinished: {steps} of {escape(str(planned or "?"))} steps</span>'
    kinds = [run.config.get(part, {}).get("kind") for part in ("algorithm", "backbone")]
    subtitle = " · ".join(
        [str(kind) for kind in kinds if kind]
        + [f"{run.summary.get('steps', planned or steps)} steps"]
        + ([f"seed {run.config['seed']}"] if "seed" in run.config else [])
        + ([f"config {run.summary['config_hash']}"] if "config_hash" in run.summary else [])
    )
    images, speed = run.summary.get("images_drawn"), run.summary.get("images_per_s")
    wall = run.summary.get("wall_seconds", run.rows[-1].get("seconds") if run.rows else None)
    pace = [sum(row[name] or 0 for name in row if name in run.stages) for row in run.rows]
    batch = (run.config.get("prompts_per_step"), run.config.get("rollout", {}).get("group_size"))
    tiles = [
        _headline_tile(run),
        _tile("wall time", "–" if wall is None else duration(wall), f"{duration(median(pace))} a step" if pace else ""),
        _tile("training steps", str(steps), "{} prompts × {} images".format(*batch) if all(batch) else ""),
        _tile("images drawn", "–" if images is None else f"{images:,}", "training and evaluation"),
        _tile("throughput", "–" if speed is None else number(speed), "images/s"),
    ]
    title = f'<div class="head"><h1>{escape(run.name)}</h1>{state}</div><div class="sub">{escape(subtitle)}</div>'
    return f'<header>{title}<div class="tiles">{"".join(tiles)}</div></header>'


def _tile(label: str, value: str, foot: str) -> str:
    return f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(foot)}</span></div>'


def _headline_tile(run: RunData) -> str:
    old, new = (side.get("overall", {}).get(run.headline) for side in (run.before, run.after))
    label = f"held-out {short(run.headline)}, mean of task means" if run.headline else "held-out score"
    if not run.summary and "step" in run.after:
        label = f"held-out {short(run.headline)}, up to step {run.after['step']}"
    if old is None:
        return _tile(label, "–", "not evaluated")
    if new is None:
        return _tile(label, f"{old:.3f}", "before; not evaluated after")
    sides = f'{old:.3f} <span class="arrow">→</span> {new:.3f}'
    foot = " → ".join(
        f"{low:.3f}–{high:.3f}"
        for low, high in (side.get("interval", {}).get(run.headline, (None, None)) for side in (run.before, run.after))
        if low is not None
    )
    foot = f"95 % intervals {foot}" if foot else f"{_percent(old, new)} of the score before"
    return f'<div class="tile"><span>{escape(label)}</span><b>{sides}{_change(new - old)}</b><span>{foot}</span></div>'


def _percent(old: float, new: float) -> str:
    return f"{100 * new / old:.0f} %" if old else "–"


def _change(change: float | None) -> str:
    if change is None:
        return "–"
    kind = "good" if change > 0 else "bad" if change < 0 else ""
    return f'<span class="{kind}">{change:+.3f}</span>'


def scores(run: RunData) -> str:
    """Held-out scores: the headline per task with bars, and every column overall."""
    if not run.headline:
        return ""
    cells = compare(run.before, run.after)
    tasks = {task: row[run.headline] for task, row in cells["tasks"].items() if run.headline in row}
    overall = cells["overall"][run.headline]
    scale = _scale([overall, *tasks.values()])
    interval = run.after.get("interval", {}).get(run.headline)
    rows = "".join(_row(task, cell, charts.bars(cell["before"], cell["after"], scale)) for task, cell in tasks.items())
    bar = charts.bars(overall["before"], overall["after"], scale, interval)
    rows += _row("overall", overall, bar, "total")
    legend = (
        '<i class="key before"></i>before &nbsp; <i class="key after"></i>after'
        + (", with its 95 % interval over prompts" if interval else "")
        + f"; bars from {number(scale[0])} to {number(scale[1])}"
    )
    per_task = f"<table><tr>{_titles('task')}<th></th></tr>{rows}</table>"
    other = "".join(_row(short(column), cell) for column, cell in cells["overall"].items())
    every = f"<table><tr>{_titles('score')}</tr>{other}</table>"
    count = run.after.get("count") or run.before.get("count")
    note = f"<small>{count} images a side, fixed prompts and seeds</small>" if count else ""
    return (
        f'<h2>Held-out scores{note}</h2><div class="panels">'
        + panel(f"{short(run.headline)} by task", legend, per_task, "w7")
        + panel("Every score", "overall: the mean of the task means", every, "w5")
        + f"</div>{_every_task(cells)}"
    )


def _every_task(cells: dict[str, Any]) -> str:
    """All scores by task, folded: before → after and the change."""
    columns = list(cells["overall"])
    titles = "".join(f'<th class="num">{escape(short(column))}</th>' for column in columns)
    rows = "".join(
        f"<tr><td>{escape(task)}</td>{''.join(_arrow(row.get(column)) for column in columns)}</tr>"
        for task, row in cells["tasks"].items()
    )
    table = f'<div class="scroll"><table><tr><th>task</th>{titles}</tr>{rows}</table></div>'
    return f"<details><summary>Every score by task</summary>{table}</details>"


def _arrow(cell: dict[str, float | None] | None) -> str:
    if cell is None:
        return '<td class="num">–</td>'
    old, new = ("–" if cell[side] is None else f"{cell[side]:.3f}" for side in ("before", "after"))
    return f'<td class="num">{old} → {new} &nbsp;{_change(cell["change"])}</td>'


def _titles(first: str) -> str:
    return f"<th>{first}</th>" + "".join(f'<th class="num">{name}</th>' for name in ("before", "after", "change"))


def _row(name: str, cell: dict[str, float | None], bar: str = "", kind: str = "") -> str:
    sides = ("–" if cell[side] is None else f"{cell[side]:.3f}" for side in ("before", "after"))
    numbers = "".join(f'<td class="num">{text}</td>' for text in (*sides, _change(cell["change"])))
    bar = f'<td class="barcell">{bar}</td>' if bar else ""
    return f'<tr class="{kind}"><td>{escape(name)}</td>{numbers}{bar}</tr>'


def _scale(cells: list[dict[str, float | None]]) -> tuple[float, float]:
    """0 to 1 where all values are in it, else the values' own range with zero."""
    values = [cell[side] for cell in cells for side in ("before", "after") if cell[side] is not None]
    return (0.0, 1.0) if all(0 <= value <= 1 for value in values) else charts.span(values, from_zero=True)


def grids(run: RunData) -> str:
    """The first and the last grid side by side."""
    if not run.grids:
        return ""
    shown = [run.grids[0], run.grids[-1]] if len(run.grids) > 1 else run.grids
    figures = [
        panel("before: the base model" if step == 0 else f"after step {step}", "", _image(path, step), "w6")
        for step, path in shown
    ]
    prompts = "".join(f"<li>{escape(prompt)}</li>" for prompt in run.grid_prompts)
    listed = f"<details><summary>The {len(run.grid_prompts)} prompts</summary><ol>{prompts}</ol></details>"
    return (
        "<h2>Samples<small>same prompts, same noise</small></h2>"
        f'<div class="panels">{"".join(figures)}</div>{listed if prompts else ""}'
    )


def _image(path: Path, step: int) -> str:
    data, kind = path.read_bytes(), "png"
    picture = Image.open(io.BytesIO(data))
    if len(data) > GRID_BYTES:
        picture = picture.convert("RGB")
        picture.thumbnail((GRID_WIDTH, 20 * GRID_WIDTH))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88)
        data, kind = buffer.getvalue(), "jpeg"
    width, height = picture.size
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img alt="sample grid of step {step}" width="{width}" height="{height}" src="{source}">'


def provenance(run: RunData) -> str:
    """What was made, from what: the LoRA and its checksum, versions, the whole configuration."""
    made = {
        "LoRA": run.summary.get("lora_path"),
        "checksum": run.summary.get("lora_checksum"),
        "config hash": run.summary.get("config_hash"),
        "seed": run.summary.get("seed", run.config.get("seed")),
        "workers lost and replaced": run.summary.get("workers_lost"),
    }
    rows = "".join(
        f"<tr><td>{name}</td><td><code>{escape(str(value))}</code></td></tr>"
        for name, value in made.items()
        if value is not None
    )
    panels = panel("Result", "", f"<table>{rows}</table>", "w7") if rows else ""
    if versions := run.summary.get("versions"):
        panels += panel("Versions", "", facts_table({name: str(text) for name, text in versions.items()}), "w5")
    config = f"<pre>{escape(run.config_text)}</pre>" if run.config_text else ""
    config = f"<details><summary>Resolved configuration</summary>{config}</details>" if config else ""
    return f'<h2>Provenance</h2><div class="panels">{panels}</div>{config}' if panels or config else ""
