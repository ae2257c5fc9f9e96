"""report.html: one self-contained page about a run, made from the files of its directory and from nothing else.

This file decides what the page says, `report.html.j2` how it looks, and `charts.py` draws its curves.
"""

import base64
import io
import re
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from align_cluster.files import write_text
from align_cluster.observe.charts import PALETTE, STAGES, Point, Series, line_chart, smoothing, stacked_chart
from align_cluster.observe.metrics import describe
from align_cluster.observe.progress import clock
from align_cluster.observe.rundata import RunData, load
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.table import compare, short

TEMPLATE = Path(__file__).with_name("report.html.j2")
WIDE, SMALL = (620, 200), (300, 160)  # sizes of charts; the page scales them to its panels
GRID_WIDTH, GRID_BYTES = 1280, 1_500_000  # a grid of more bytes is embedded as a JPEG of this width
FROM_ZERO = ("fraction", "s", "bytes", "images/s")  # units whose axis begins at zero
FIRST = ("group/", "images/", "advantage/", "slas/", "explore/", "train/", "lr")  # order of the metrics of an update
ELSEWHERE = ("reward/", "time/", "throughput/", "weights/", "scoring/")  # metrics that other sections show


@dataclass(frozen=True)
class Panel:
    """One framed chart with its caption.

    `values` are the first and the last number as text; `lost` counts the steps whose value was not finite.
    """

    title: str
    meaning: str
    chart: Markup
    unit: str = ""
    values: str = ""
    lost: int = 0
    wide: bool = False


def write_report(run_dir: Path | str) -> Path:
    """Write report.html into `run_dir` and return its path.

    The page leaves out whatever the directory lacks, so a run that is still going, or that stopped half-way, has a
    report too. The page has no script, and its security policy forbids the network. UserError where there is no run;
    nothing is written then.
    """
    files = RunDir(run_dir)
    run = load(files)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "short": short}
    environment.globals["place"] = place
    window = smoothing(len(run.rows))
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=run,
        palette=PALETTE,
        state="" if run.summary else f"{len(run.rows)} of {run.config.get('steps') or '?'} steps",
        subtitle=_subtitle(run),
        tiles=_tiles(run),
        scores=compare(run.before, run.after),
        interval=run.after.get("interval", {}).get(run.headline),
        scale=_scale(run),
        grids=[_grid(path, step) for step, path in [*run.grids[:1], *run.grids[1:][-1:]]],
        smoothing=f"thin: each step; bold: mean of the last {window} steps" if window > 1 else "",
        rewards=_rewards(run),
        updates=[_metric(run, name) for name in _update_metrics(run)],
        stages=_stages(run),
        stage_chart=_stage_chart(run),
        speed=[_metric(run, name) for name in run.metrics("throughput/", "weights/adopt_s", "scoring/")],
        sync=_sync(run),
        summary=run.summary,
    )
    write_text(files.report, page)
    return files.report


def duration(seconds: float) -> str:
    """Format seconds for a reader: 0.0067 s, 5.4 s, 5:04, 2:13:09."""
    return clock(seconds) if seconds >= 100 else f"{seconds:.3g} s"


def place(start: float, end: float, scale: tuple[float, float]) -> str:
    """Return the CSS that makes a bar reach from `start` to `end` on an axis with the ends `scale`."""
    low, high = scale
    left, right = (100 * (value - low) / (high - low) for value in sorted((start, end)))
    return f"left:{left:.1f}%;width:{right - left:.1f}%"


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
    before, after = (side.get("overall", {}).get(run.headline) for side in (run.before, run.after))
    when = "mean of task means" if run.summary or "step" not in run.after else f"up to step {run.after['step']}"
    label = f"held-out {short(run.headline)}, {when}"
    if before is None:
        return "held-out score", "–", "not evaluated"
    if after is None:
        return label, f"{before:.3f}", "before; not evaluated after"
    intervals = [side.get("interval", {}).get(run.headline) for side in (run.before, run.after)]
    note = " → ".join(f"{low:.3f}–{high:.3f}" for low, high in filter(None, intervals))
    return label, f"{before:.3f} → {after:.3f} ({after - before:+.3f})", f"95 % intervals {note}" if note else ""


def _scale(run: RunData) -> tuple[float, float]:
    """Return the axis of the headline's bars: 0 to 1 where all scores are in it, else the scores' range with zero."""
    sides = [[side.get("overall", {}), *side.get("tasks", {}).values()] for side in (run.before, run.after)]
    values = [0.0, *(means[run.headline] for side in sides for means in side if means.get(run.headline) is not None)]
    return (0.0, 1.0) if all(0 <= value <= 1 for value in values) else (min(values), max(values))


def _grid(path: Path, step: int) -> dict[str, Any]:
    """Return a sample grid as a data URI with its title and size; a large one becomes a smaller JPEG."""
    data, kind = path.read_bytes(), "png"
    picture = Image.open(io.BytesIO(data))
    if len(data) > GRID_BYTES:
        picture = picture.convert("RGB")
        picture.thumbnail((GRID_WIDTH, 20 * GRID_WIDTH))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88)
        data, kind = buffer.getvalue(), "jpeg"
    return {
        "title": "before: the base model" if step == 0 else f"after step {step}",
        "source": f"data:image/{kind};base64,{base64.b64encode(data).decode()}",
        "size": picture.size,
    }


def _rewards(run: RunData) -> list[Panel]:
    """Return the curves of the rewards: the trained one wide, the held-out one, one per task, then the others."""
    means = [name for name in run.metrics("reward/") if name.endswith("/mean")]
    if not means:
        return _held_out(run)
    main = next((name for name in means if name.split("/")[1] == short(run.headline).split("/")[0]), means[0])
    prefix = main.removesuffix("mean")
    tasks = {f"{prefix}{task}": task for task in run.tasks if run.points(f"{prefix}{task}")}
    values = [y for name in tasks for _, y in run.points(name) if y is not None]
    air = 0.06 * (max(values) - min(values)) if values else 0
    shared = (min(values) - air, max(values) + air) if air else None
    others = [name for name in dict.fromkeys([*means, *run.metrics(prefix)]) if name != main and name not in tasks]
    return [
        _metric(run, main, wide=True),
        *_held_out(run),
        *(
            replace(_metric(run, name, ys=shared), title=task, meaning=f"{name}; the tasks share one scale")
            for name, task in tasks.items()
        ),
        *(_metric(run, name) for name in others),
    ]


def _held_out(run: RunData) -> list[Panel]:
    """Return the held-out headline over steps, overall and per task, where the run evaluated more than twice."""
    if len(run.evaluations) < 3 or not run.headline:
        return []
    column, evaluations = run.headline, run.evaluations
    lines = [
        Series(task, [(e["step"], e["tasks"].get(task, {}).get(column)) for e in evaluations], f"stage-{i % STAGES}")
        for i, task in enumerate(run.tasks, start=1)
    ]
    band = [(e["step"], *e["interval"][column]) for e in evaluations if column in e.get("interval", {})]
    lines.append(Series("overall", [(e["step"], e["overall"].get(column)) for e in evaluations], band=band))
    note = "overall with its 95 % interval, and each task" if band else "overall and each task"
    return [Panel(f"held-out {short(column)}", note, _inline(line_chart(lines, WIDE)), "score", wide=True)]


def _update_metrics(run: RunData) -> list[str]:
    """Return the names of what the run wrote about groups, credit and updates, a kind's own metrics included."""
    names = [name for name in run.metrics("") if name not in ("step", "seconds") and not name.startswith(ELSEWHERE)]
    return list(dict.fromkeys([name for prefix in FIRST for name in names if name.startswith(prefix)] + names))


def _metric(run: RunData, name: str, wide: bool = False, ys: tuple[float, float] | None = None) -> Panel:
    """Return the curve of one metric; a name that another version wrote has no unit and no meaning."""
    try:
        unit, meaning = describe(name).unit, describe(name).meaning
    except ValueError:
        unit = meaning = ""
    points = run.points(name)
    window = 1 if name == "lr" else smoothing(len(run.rows))
    chart = line_chart([Series(name, points)], WIDE if wide else SMALL, window, ys, unit in FROM_ZERO)
    lost = sum(y is None for _, y in points)
    return Panel(name, meaning, _inline(chart), unit, _first_and_last(points), lost, wide)


def _first_and_last(points: list[Point]) -> str:
    known = [f"{y:.3g}" for _, y in points if y is not None]
    return " → ".join([*known[:1], *known[1:][-1:]])


def _inline(chart: str) -> Markup:
    """Return a chart whose colours are the page's variables, so that they follow the reader's light or dark theme."""
    for name, colour in PALETTE.items():
        chart = chart.replace(colour, f"var(--{name})")
    chart = re.sub(r' xmlns(:xlink)?="[^"]*"', "", chart)
    return Markup(re.sub(r'<g id="[^"]*">', "<g>", chart))


def _stages(run: RunData) -> list[tuple[str, str, float, float]]:
    """Return name, colour, seconds and share of each stage of the run, with the colours of the chart."""
    totals = run.stage_seconds if run.stages else {}
    order = list(dict.fromkeys([*(name.removeprefix("time/") for name in run.stages), *totals]))
    whole = sum(totals.values()) or 1.0
    return [(name, f"stage-{order.index(name) % STAGES}", spent, spent / whole) for name, spent in totals.items()]


def _stage_chart(run: RunData) -> Markup | None:
    layers = {name: [row.get(name) or 0.0 for row in run.rows] for name in run.stages}
    return _inline(stacked_chart([row["step"] for row in run.rows], layers, WIDE)) if layers else None


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
