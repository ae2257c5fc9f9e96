"""The report's sections on curves: rewards, groups and updates, time. A RunData in, HTML out, "" for nothing."""

from collections.abc import Callable
from html import escape
from statistics import median
from typing import Any

from align_cluster.observe import charts
from align_cluster.observe.blocks import duration, facts_table, panel, short
from align_cluster.observe.charts import Series, number
from align_cluster.observe.metrics import Metric, describe
from align_cluster.observe.rundata import RunData

WIDE, MIDDLE, NARROW = (760, 220), (360, 220), (260, 150)  # chart sizes in CSS pixels of a 1240 pixel page


def rewards(run: RunData) -> str:
    """Reward of the training images, and of the held-out ones where the run evaluated in between."""
    means = [name for name in run.metrics("reward/") if name.endswith("/mean")]
    if not means:
        return ""
    main = next((name for name in means if name.split("/")[1] == short(run.headline).split("/")[0]), means[0])
    prefix = main.removesuffix("mean")
    parts = [name for name in run.metrics(prefix) if name != main]
    tasks = [name for name in parts if name.removeprefix(prefix) in run.tasks]
    ys = charts.span([y for name in tasks for _, y in run.points(name) if y is not None])
    small = [
        lambda kind, size, name=name: panel(
            name.removeprefix(prefix), f"{escape(name)}; the tasks share one scale", _line(run, name, size, ys), kind
        )
        for name in tasks
    ]
    small += _metric_panels(run, [name for name in (*means, *parts) if name != main and name not in tasks])
    window = smoothing(len(run.rows))
    note = f"<small>thin: each step; bold: mean of the last {window} steps</small>" if window > 1 else ""
    top = _metric_panel(run, main, "w8", WIDE) + _held_out(run)
    return f'<h2>Reward{note}</h2><div class="panels">{top}</div>{_rows(small)}'


def _rows(panels: list[Callable[[str, tuple[int, int]], str]]) -> str:
    """Small panels three or four to a row, whichever leaves fewer places empty."""
    three = -len(panels) % 3 < -len(panels) % 4
    kind, size = ("w4", (MIDDLE[0], 180)) if three else ("w3", NARROW)
    return f'<div class="panels">{"".join(one(kind, size) for one in panels)}</div>' if panels else ""


def smoothing(steps: int) -> int:
    """Window of the running mean: none for a short run, then a tenth of it, at most 50 steps."""
    return 1 if steps < 16 else min(50, max(3, steps // 10))


def _metric_panels(run: RunData, names: list[str]) -> list[Callable[[str, tuple[int, int]], str]]:
    return [lambda kind, size, name=name: _metric_panel(run, name, kind, size) for name in names]


def _metric_panel(run: RunData, name: str, kind: str, size: tuple[int, int]) -> str:
    lost = sum(1 for _, y in run.points(name) if y is None)
    steps = "1 step" if lost == 1 else f"{lost} steps"
    meaning = escape(_described(name).meaning) + (f'; <span class="bad">not finite in {steps}</span>' if lost else "")
    chart = _line(run, name, size)
    return panel(name, meaning, f'<div class="scroll">{chart}</div>' if size == WIDE else chart, kind)


def _described(name: str) -> Metric:
    """The declaration, or an empty one for a name that another version wrote."""
    try:
        return describe(name)
    except ValueError:
        return Metric(name, "", "")


def _line(run: RunData, name: str, size: tuple[int, int], ys: tuple[float, float] | None = None) -> str:
    unit = _described(name).unit
    window = 1 if name == "lr" else smoothing(len(run.rows))
    from_zero = unit in ("fraction", "s", "bytes", "images/s")
    return charts.line_chart(name, [Series(name, run.points(name))], unit, *size, from_zero, window, ys)


def _held_out(run: RunData) -> str:
    """Held-out headline over steps, overall and per task; two evaluations are the table's business."""
    if len(run.evaluations) < 3 or not run.headline:
        return ""
    column = run.headline
    lines = [
        Series(task, _curve(run, lambda one, task=task: one["tasks"].get(task, {}).get(column)), "muted")
        for task in run.tasks
    ]
    band = [(one["step"], *one["interval"][column]) for one in run.evaluations if column in one.get("interval", {})]
    lines.append(Series("overall", _curve(run, lambda one: one["overall"].get(column)), band=band))
    chart = charts.line_chart(f"held-out {column}", lines, "score", *MIDDLE)
    note = "overall with its 95 % interval, and each task" if band else "overall and each task"
    return panel(f"held-out {short(column)}", note, chart)


def _curve(run: RunData, value: Callable[[dict[str, Any]], float | None]) -> list[charts.Point]:
    return [(one["step"], value(one)) for one in run.evaluations]


def training(run: RunData) -> str:
    """Groups and optimisation: every metric that the run wrote under these names."""
    prefixes = ("group/", "images/", "advantage/", "slas/", "explore/", "train/", "lr")
    names = [name for prefix in prefixes for name in run.metrics(prefix)]
    check = run.summary.get("self_check")
    bound = number(check["max_abs_log_ratio"]) if check else ""
    note = f"<small>self-check: |log ratio| at most {bound} before the first update</small>" if check else ""
    return f"<h2>Groups and updates{note}</h2>{_rows(_metric_panels(run, names))}" if names else ""


def timing(run: RunData) -> str:
    """Where the time went: per step, in total, images per second, weight syncs."""
    totals, names = run.stage_seconds, run.stages
    if not names:
        return ""
    steps = [row["step"] for row in run.rows]
    layers = {name.removeprefix("time/"): [row.get(name) or 0.0 for row in run.rows] for name in names}
    order = {stage: index for index, stage in enumerate([*layers, *(s for s in totals if s not in layers)])}
    chart = charts.stacked_chart("seconds a step by stage", steps, layers, "s", *WIDE)
    small = _metric_panels(run, [*run.metrics("throughput/"), *run.metrics("weights/adopt_s")])
    if sync := _sync(run):
        small.append(lambda kind, size: panel("weight sync", "LoRA to every sampler, proven by receipts", sync, kind))
    return (
        '<h2>Time</h2><div class="panels">'
        + panel("seconds a step, by stage", "", f'<div class="scroll">{chart}</div>', "w8")
        + panel("total by stage", "", _totals(totals, order))
        + f"</div>{_rows(small)}"
    )


def _totals(totals: dict[str, float], order: dict[str, int]) -> str:
    whole = sum(totals.values()) or 1.0
    bar = "".join(
        f'<i class="stage-{order[stage]}" style="flex:{seconds / whole:.4f}" title="{escape(stage)}"></i>'
        for stage, seconds in totals.items()
    )
    rows = "".join(
        f'<tr><td><i class="key stage-{order[stage]}"></i>{escape(stage)}</td><td class="num">{duration(seconds)}</td>'
        f'<td class="num">{100 * seconds / whole:.1f} %</td></tr>'
        for stage, seconds in totals.items()
    )
    titles = '<th>stage</th><th class="num">total</th><th class="num">share</th>'
    return f'<div class="share">{bar}</div><table><tr>{titles}</tr>{rows}</table>'


def _sync(run: RunData) -> str:
    """Figures of the weight syncs."""
    sizes = [y for _, y in run.points("weights/bytes") if y is not None]
    delays = [y for _, y in run.points("weights/adopt_s") if y is not None]
    if not sizes or not delays:
        return ""
    return facts_table(
        {
            "syncs": str(len(delays)),
            "buffer": f"{sizes[-1] / 1e6:.2f} MB",
            "published to adopted, median": duration(median(delays)),
            "slowest": duration(max(delays)),
        }
    )
