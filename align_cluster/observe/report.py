"""report.html: one self-contained page about a run, or two side by side, made from their folders and nothing else.

This file decides what the page says, `panels.py` makes its curves and pictures, and `report.html.j2` is how it looks.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from align_cluster.errors import counted
from align_cluster.files import writable, write_text
from align_cluster.observe.charts import (
    PALETTE,
    STAGES,
    Series,
    line_chart,
    smoothing,
    stacked_chart,
    timeline_chart,
)
from align_cluster.observe.panels import COLOURS, WIDE, Panel, inline, metric_panel, picture
from align_cluster.observe.progress import clock
from align_cluster.observe.rundata import RunData, load
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.table import compare, short, within_noise

TEMPLATE = Path(__file__).with_name("report.html.j2")
GRIDS = 9  # sample grids that a page shows of a run at most, spread from the first to the last
FIRST = ("group/", "images/", "advantage/", "slas/", "explore/", "train/", "lr")  # order of the metrics of an update
ELSEWHERE = ("reward/", "time/", "throughput/", "weights/", "scoring/", "idle/")  # metrics that other sections show
LANES = 8  # workers of a kind that the timeline of a step shows at most
SPEED = "/images_per_s"  # how the speed of a reward ends, which stands among its scores


def write_report(*folders: Path | str, out: Path | None = None) -> Path:
    """Write a page about one run or two, and return its path: `out`, or report.html in the first run's folder.

    The page leaves out whatever a folder lacks, so a run that is still going, or that stopped half-way, has a report
    too. The page has no script, and its security policy forbids the network. UserError where there is no run; nothing
    is written then. A page about two runs needs `out`.
    """
    runs = [load(RunDir(folder)) for folder in folders]
    if len(runs) > 1:
        paths = [Path(folder).resolve() for folder in folders]
        names = [path.name for path in paths] if len({path.name for path in paths}) > 1 else map(str, folders)
        runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    page = out or RunDir(folders[0]).report
    if out:
        writable(out)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "short": short}
    environment.globals |= {"place": place, "within_noise": within_noise}
    window = max(smoothing(len(run.rows)) for run in runs)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        palette=PALETTE,
        runs=[_view(run, colour) for run, colour in zip(runs, COLOURS, strict=False)],
        scores=_scores(runs),
        strips=list(_strips(runs)),
        smoothing=f"thin: each step; bold: mean of the last {window} steps" if window > 1 else "",
        rewards=_rewards(runs),
        updates=[metric_panel(runs, name) for name in _update_metrics(runs)],
        speed=[metric_panel(runs, name) for name in _speed_metrics(runs)],
        differences=_differences(*(run.config for run in runs)) if len(runs) > 1 else [],
    )
    write_text(page, text)
    return page


def duration(seconds: float) -> str:
    """Format seconds for a reader: 0.0067 s, 5.4 s, 5:04, 2:13:09."""
    return clock(seconds) if seconds >= 100 else f"{seconds:.3g} s"


def place(start: float, end: float, scale: tuple[float, float]) -> str:
    """Return the CSS that makes a bar reach from `start` to `end` on an axis with the ends `scale`."""
    low, high = scale
    left, right = (100 * (value - low) / (high - low) for value in sorted((start, end)))
    return f"left:{left:.1f}%;width:{right - left:.1f}%"


def _view(run: RunData, colour: str) -> dict[str, Any]:
    """Return what the page says of one run alone."""
    return {
        "run": run,
        "colour": colour,
        "state": "" if run.summary else f"{len(run.rows)} of {run.config.get('steps') or '?'} steps",
        "unfinished": "" if run.summary else _unfinished(run),
        "subtitle": _subtitle(run),
        "tiles": _tiles(run),
        "stages": _stages(run),
        "stage_chart": _stage_chart(run),
        "timeline": _timeline(run),
        "sync": _sync(run),
        "made": _made(run),
    }


def _unfinished(run: RunData) -> str:
    """Say what a run that has not finished has, and how it goes on."""
    if not run.rows and not run.evaluations:
        return "No step and no evaluation is finished yet."
    evaluated, drawn = [record["step"] for record in run.evaluations], [step for step, _ in run.grids]
    parts = [counted(len(run.rows), "training step")]
    for kind, at in (("held-out evaluation", evaluated), ("sample grid", drawn), ("checkpoint", run.checkpoints)):
        parts += [f"{counted(len(at), kind)} (the last after step {at[-1]})"] if at else []
    ended = f" It ended with: {run.error}." if run.error else ""
    on = " `align-cluster train CONFIG --resume RUN` goes on from its last checkpoint." if run.checkpoints else ""
    return f"There are {', '.join(parts)}, and no LoRA yet.{ended}{on}"


def _subtitle(run: RunData) -> str:
    steps = run.summary.get("steps", run.config.get("steps") or len(run.rows))
    facts = [run.config.get(part, {}).get("kind") for part in ("algorithm", "backbone")] + [f"{steps} steps"]
    facts += [f"seed {run.config['seed']}"] if "seed" in run.config else []
    facts += [f"config {run.summary['config_hash']}"] if "config_hash" in run.summary else []
    return " · ".join(str(fact) for fact in facts if fact)


def _tiles(run: RunData) -> list[tuple[str, str, str]]:
    """Return label, value and note of the numbers at the top, the held-out headline score first."""
    images, speed = run.summary.get("images_drawn"), run.summary.get("images_per_s")
    wall = run.summary.get("wall_seconds", run.rows[-1].get("seconds") if run.rows else None)
    pace = [sum(row.get(name) or 0 for name in run.stages) for row in run.rows]
    batch = (run.config.get("prompts_per_step"), run.config.get("rollout", {}).get("group_size"))
    return [
        _headline(run),
        ("wall time", "–" if wall is None else duration(wall), f"{duration(median(pace))} a step" if pace else ""),
        ("training steps", str(len(run.rows)), "{} prompts × {} images".format(*batch) if all(batch) else ""),
        ("images drawn", "–" if images is None else f"{images:,}", "training and evaluation"),
        ("throughput", "–" if speed is None else f"{speed:.3g}", "images/s"),
    ]


def _headline(run: RunData) -> tuple[str, str, str]:
    """Return label, value and note of the held-out headline score, before and after."""
    cell = compare(run.before, run.after)["overall"].get(run.headline)
    when = "mean of task means" if run.summary or "step" not in run.after else f"up to step {run.after['step']}"
    label = f"held-out {short(run.headline)}, {when}"
    if cell is None or cell["before"] is None:
        return "held-out score", "–", "not evaluated"
    if cell["after"] is None:
        return label, f"{cell['before']:.3f}", "before; not evaluated after"
    note = "within the noise; " if within_noise(cell) else ""
    if cell["interval"]:
        note += "95 % interval of the change {:+.3f} to {:+.3f}, paired by prompt".format(*cell["interval"])
    return label, f"{cell['before']:.3f} → {cell['after']:.3f} ({cell['change']:+.3f})", note


def _scores(runs: list[RunData]) -> dict[str, Any] | None:
    """Return the held-out scores of two sides: before and after one run, or the last ones of two runs.

    Runs on different held-out prompts are not paired by prompt. `interval` is that of the right side's headline, and
    `scale` holds the ends of the bars' axis.
    """
    column = runs[0].headline
    if not column:
        return None
    change, labels, colours, sides = "change", ("before", "after"), ("muted", "accent"), [runs[0].before, runs[0].after]
    if len(runs) > 1:
        change, labels, colours = "difference", [run.name for run in runs], COLOURS
        sides = [run.after or run.before for run in runs]
        first, second = (run.config.get("evaluate", {}).get("prompts") for run in runs)
        if first != second:
            sides = [side | {"by_prompt": {}} for side in sides]
    means = [means for side in sides for means in (side.get("overall", {}), *side.get("tasks", {}).values())]
    values = [0.0, *(one[column] for one in means if one.get(column) is not None)]
    return {
        "column": column,
        "change": change,
        "labels": labels,
        "colours": colours,
        "cells": compare(*sides),
        "interval": sides[1].get("interval", {}).get(column),
        "count": sides[1].get("count") or sides[0].get("count"),
        "scale": (0.0, 1.0) if all(0 <= value <= 1 for value in values) else (min(values), max(values)),
    }


def _strips(runs: list[RunData]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield rows of sample grids with their titles: what one run drew before and after, or what two drew."""
    for run in runs:
        most = range(min(len(run.grids), GRIDS))
        chosen = [run.grids[round(index * (len(run.grids) - 1) / max(1, most[-1]))] for index in most]
        grids = [picture(path, "base model" if step == 0 else f"step {step}") for step, path in chosen]
        parts = {run.name: grids} if len(runs) > 1 else {"before": grids[:1], "after": grids[1:]}
        yield from ((title, part) for title, part in parts.items() if part)


def _names(runs: list[RunData], *prefixes: str) -> list[str]:
    """Return the names of metrics of any run that begin with one of `prefixes`."""
    return list(dict.fromkeys(name for run in runs for name in run.metrics(*prefixes)))


def _rewards(runs: list[RunData]) -> list[Panel]:
    """Return the curves of the rewards: the trained one wide, the held-out one, one per task, then the others."""
    means = [name for name in _names(runs, "reward/") if name.endswith("/mean")]
    if not means:
        return _held_out(runs)
    trained = short(runs[0].headline).split("/")[0]
    main = next((name for name in means if name.split("/")[1] == trained), means[0])
    prefix = main.removesuffix("mean")
    tasks = {f"{prefix}{task}": task for run in runs for task in run.tasks if run.points(f"{prefix}{task}")}
    values = [y for run in runs for name in tasks for _, y in run.points(name) if y is not None]
    air = 0.06 * (max(values) - min(values)) if values else 0
    shared = (min(values) - air, max(values) + air) if air else None
    others = [name for name in dict.fromkeys([*means, *_names(runs, prefix)]) if name != main and name not in tasks]
    return [
        metric_panel(runs, main, wide=True),
        *_held_out(runs),
        *(
            replace(metric_panel(runs, name, ys=shared), title=task, note="; the tasks share one scale")
            for name, task in tasks.items()
        ),
        *(metric_panel(runs, name) for name in others if not name.endswith(SPEED)),
    ]


def _held_out(runs: list[RunData]) -> list[Panel]:
    """Return the held-out headline over steps, where a run evaluated more than twice; of one run also by task."""
    column = runs[0].headline
    if not column or all(len(run.evaluations) < 3 for run in runs):
        return []
    lines = []
    if len(runs) == 1:
        for index, task in enumerate(runs[0].tasks, start=1):
            points = [(e["step"], e["tasks"].get(task, {}).get(column)) for e in runs[0].evaluations]
            lines.append(Series(task, points, f"stage-{index % STAGES}"))
    for run, colour in zip(runs, COLOURS, strict=False):
        band = [(e["step"], *e["interval"][column]) for e in run.evaluations if column in e.get("interval", {})]
        label = run.name if len(runs) > 1 else "overall"
        lines.append(Series(label, [(e["step"], e["overall"].get(column)) for e in run.evaluations], colour, band))
    note = "with the 95 % interval over prompts of each evaluation alone" if lines[-1].band else ""
    return [Panel(f"Held-out {short(column)}", "", inline(line_chart(lines, WIDE)), "score", note, wide=True)]


def _update_metrics(runs: list[RunData]) -> list[str]:
    """Return the names of what a run wrote about groups, credit and updates, a kind's own metrics included."""
    names = [name for name in _names(runs, "") if name not in ("step", "seconds") and not name.startswith(ELSEWHERE)]
    return list(dict.fromkeys([name for prefix in FIRST for name in names if name.startswith(prefix)] + names))


def _speed_metrics(runs: list[RunData]) -> list[str]:
    names = _names(runs, "throughput/", "idle/", "weights/adopt_s", "scoring/")
    return names + [name for name in _names(runs, "reward/") if name.endswith(SPEED)]


def _differences(first: Any, second: Any, path: str = "") -> list[tuple[str, str, str]]:
    """Return path and both values of the settings that differ, but for where the runs are."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [key for key in dict.fromkeys([*first, *second]) if path or key not in ("name", "out")]
        pairs = ((first.get(key), second.get(key), f"{path}.{key}".lstrip(".")) for key in keys)
        return [row for pair in pairs for row in _differences(*pair)]
    return [] if first == second else [(path, *(json.dumps(value, ensure_ascii=False) for value in (first, second)))]


def _stages(run: RunData) -> list[tuple[str, str, float, float]]:
    """Return name, colour, seconds and share of each stage of the run, with the colours of the chart."""
    totals = run.stage_seconds if run.stages else {}
    order = list(dict.fromkeys([*(name.removeprefix("time/") for name in run.stages), *totals]))
    whole = sum(totals.values()) or 1.0
    return [(name, f"stage-{order.index(name) % STAGES}", spent, spent / whole) for name, spent in totals.items()]


def _stage_chart(run: RunData) -> Markup | None:
    layers = {name: [row.get(name) or 0.0 for row in run.rows] for name in run.stages}
    return inline(stacked_chart([row["step"] for row in run.rows], layers, WIDE)) if layers else None


def _timeline(run: RunData) -> Markup | None:
    """Return a chart of who worked when in the last step; of many workers, the first of each kind."""
    lanes = run.timeline.get("workers")
    if not lanes:
        return None
    shown = [lane for kind in dict.fromkeys(lane["pool"] for lane in lanes) for lane in _some(lanes, kind)]
    return inline(timeline_chart(shown, run.timeline["seconds"], (WIDE[0], 50 + 18 * len(shown))))


def _some(lanes: list[dict[str, Any]], pool: str) -> list[dict[str, Any]]:
    return [lane for lane in lanes if lane["pool"] == pool][:LANES]


def _made(run: RunData) -> dict[str, Any]:
    """Return facts about the run's result and where it comes from."""
    known = run.summary
    check = known.get("self_check")
    facts = {
        "LoRA": known.get("lora_path"),
        "checksum": known.get("lora_checksum"),
        "config hash": known.get("config_hash"),
        "seed": known.get("seed", run.config.get("seed")),
        "workers lost and replaced": known.get("workers_lost"),
        "self-check: |log ratio| at most, before the first update": check and f"{check['max_abs_log_ratio']:.3g}",
    }
    return {name: value for name, value in facts.items() if value is not None}


def _sync(run: RunData) -> dict[str, str]:
    """Return figures of the weight syncs."""
    sizes, delays = ([y for _, y in run.points(f"weights/{name}") if y is not None] for name in ("bytes", "adopt_s"))
    if not sizes or not delays:
        return {}
    return {
        "syncs": str(len(delays)),
        "buffer": f"{sizes[-1] / 1e6:.2f} MB",
        "published to adopted, median": duration(median(delays)),
        "slowest": duration(max(delays)),
    }
