"""Charts as SVG text, drawn by matplotlib: lines over steps, stacked stages, and scattered points.

Each function imports matplotlib when it is called, so a program that draws nothing does not wait for it. The same
numbers give the same text, byte for byte, whatever the user's own matplotlib settings are.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float | None]  # x and y; a y of None leaves a gap
Size = tuple[int, int]  # width and height in pixels

COUNTS = ("step", "nodes")  # what an axis counts in whole numbers
MAX_POINTS = 160  # points that one line keeps; a longer one shows averages, since a chart is about 250 pixels wide
PALETTE = {
    "panel": "#ffffff",
    "soft": "#626b78",
    "grid": "#eceff3",
    "accent": "#2461c4",
    "muted": "#a9b2bf",
    "stage-0": "#2f6fcf",
    "stage-1": "#d99a2b",
    "stage-2": "#7c63b8",
    "stage-3": "#2b9384",
    "stage-4": "#c4617a",
    "stage-5": "#7b8794",
    "stage-6": "#a3b545",
}
STAGES = sum(name.startswith("stage-") for name in PALETTE)
STYLE = {
    "svg.hashsalt": "align-cluster",  # ids inside the file do not depend on the time
    "svg.fonttype": "none",  # text stays text: it can be searched, and it takes the page's font
    "text.parse_math": False,  # a "$" in somebody's task name is a dollar sign
    "figure.facecolor": PALETTE["panel"],
    "axes.facecolor": PALETTE["panel"],
    "font.size": 9,
    "text.color": PALETTE["soft"],
    "axes.labelcolor": PALETTE["soft"],
    "xtick.color": PALETTE["soft"],
    "ytick.color": PALETTE["soft"],
    "axes.edgecolor": PALETTE["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": PALETTE["grid"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Series:
    """One line or one cloud of points. `colour` is a name in PALETTE; `band` holds (x, low, high) of an interval."""

    label: str
    points: Sequence[Point]
    colour: str = "accent"
    band: Sequence[tuple[float, float, float]] = ()


def smoothing(steps: int) -> int:
    """Return the running mean's window for a run of `steps`: 1 for a short one, else a tenth of it, at most 50."""
    return 1 if steps < 16 else min(50, max(3, steps // 10))


def line_chart(
    series: Sequence[Series],
    size: Size,
    smooth: int = 1,
    ys: tuple[float, float] | None = None,
    from_zero: bool = False,
    x_label: str = "step",
    y_label: str = "",
) -> str:
    """Draw lines over steps or another count; several lines with labels have a legend at their right.

    `smooth` > 1 draws each point faintly and the mean of the last `smooth` points boldly. `ys` fixes the y range;
    `from_zero` lets it begin at 0 unless there are negative values.
    """

    def paint(axes: "Axes") -> None:
        for one in series:
            colour = PALETTE[one.colour]
            xs, values = _arrays(one.points)
            bold = np.array([_mean(values[max(0, end - smooth) : end]) for end in range(1, len(values) + 1)])
            if one.band:
                axes.fill_between(*np.array(one.band).T, color=colour, alpha=0.16, linewidth=0)
            if smooth > 1:
                axes.plot(*_thin(xs, values), color=colour, alpha=0.35, linewidth=1)
            axes.plot(*_thin(xs, bold), color=colour, linewidth=1.8, label=f" {one.label}")
            known = np.flatnonzero(np.isfinite(bold))[-1:]
            axes.plot(xs[known], bold[known], "o", color=colour, markersize=3.5)
        if ys:
            axes.set_ylim(*ys)
        elif from_zero and axes.dataLim.ymin >= 0:
            axes.set_ylim(bottom=0)
        if legend:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1.04))

    longest = max(len(one.label) for one in series)
    legend = longest * 5.5 + 30 if len(series) > 1 and longest else 0
    return _draw(paint, size, x_label, y_label, legend)


def stacked_chart(steps: Sequence[float], layers: dict[str, Sequence[float]], size: Size) -> str:
    """Draw one bar a step, cut into layers from the bottom up; layer i has the colour `stage-i`."""
    thinned = [_thin(np.array(steps, float), np.array(values, float)) for values in layers.values()]
    ends = thinned[0][0]
    edges = np.array([ends[0] - (ends[1] - ends[0] if len(ends) > 1 else 1), *ends]) + 0.5

    def paint(axes: "Axes") -> None:
        base = np.zeros(len(ends))
        for index, (_, values) in enumerate(thinned):
            colour = PALETTE[f"stage-{index % STAGES}"]
            axes.stairs(base + values, edges, baseline=base, fill=True, color=colour, linewidth=0)
            base = base + values
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, 1.06 * base.max() or 1)

    return _draw(paint, size, "step")


def timeline_chart(lanes: Sequence[dict[str, Any]], seconds: float, size: Size) -> str:
    """Draw what workers did in a step of `seconds`: one lane a worker, one colour for each kind of work, with a legend.

    A lane has a `worker` and `spans`, which are (work, start, end) in seconds.
    """
    kinds = list(dict.fromkeys(work for lane in lanes for work, _, _ in lane["spans"]))

    def paint(axes: "Axes") -> None:
        for number, lane in enumerate(lanes):
            for work, start, end in lane["spans"]:
                colour = PALETTE[f"stage-{kinds.index(work) % STAGES}"]
                axes.barh(number, end - start, left=start, height=0.7, color=colour, linewidth=0)
        for index, kind in enumerate(kinds):
            axes.barh(0, 0, color=PALETTE[f"stage-{index % STAGES}"], label=f" {kind.replace('_', ' ')}")
        axes.set(xlim=(0, seconds), ylim=(len(lanes) - 0.4, -0.6))
        axes.set_yticks([])
        for number, lane in enumerate(lanes):
            axes.text(-0.01 * seconds, number, lane["worker"], ha="right", va="center")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1.04))

    longest = max(len(lane["worker"]) for lane in lanes)
    right = max(map(len, kinds), default=0) * 5.5 + 30
    return _draw(paint, size, "s", right=right, left=longest * 5.5 + 14)


def scatter_chart(series: Sequence[Series], size: Size, x_label: str, y_label: str) -> str:
    """Draw points without lines on two equal axes, and the diagonal on which y is x."""
    known = [value for one in series for x, y in one.points if y is not None for value in (x, y)]

    def paint(axes: "Axes") -> None:
        low, high = min(known, default=0), max(known, default=1)
        air = 0.05 * (high - low) or 1
        axes.set(xlim=(low - air, high + air), ylim=(low - air, high + air))
        axes.axline((0, 0), slope=1, color=PALETTE["muted"], linewidth=1)
        for one in series:
            colour = PALETTE[one.colour]
            axes.plot(*_arrays(one.points), "o", color=colour, alpha=0.6, markersize=4, label=f" {one.label}")
        axes.legend(loc="upper left")

    return _draw(paint, size, x_label, y_label)


def _arrays(points: Sequence[Point]) -> np.ndarray:
    """Return x and y of N points as one array [2, N], with NaN where y is None."""
    return np.array([(x, math.nan if y is None else y) for x, y in points], float).reshape(-1, 2).T


def _mean(values: np.ndarray) -> float:
    """Return the mean of the finite values, or NaN where there is none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def _thin(xs: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average runs of neighbours so that at most MAX_POINTS remain; a run's x is its last one."""
    if len(xs) <= MAX_POINTS:
        return xs, values
    runs = np.array_split(np.arange(len(xs)), MAX_POINTS)
    return np.array([xs[run[-1]] for run in runs]), np.array([_mean(values[run]) for run in runs])


def _draw(
    paint: Callable[["Axes"], object],
    size: Size,
    x_label: str = "",
    y_label: str = "",
    right: float = 0,
    left: float = 0,
) -> str:
    """Let `paint` fill a figure of `size` with `right` pixels left free at its right, and return its SVG.

    At its left are `left` pixels, or as many as numbers and a label at the axis take.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width, height = size
    left, bottom, right, top = left or (58 if y_label else 42), 30, right + 12, 14
    place = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        axes = figure.add_axes(place)
        axes.xaxis.set_major_locator(MaxNLocator(max(2, width // 75), steps=(1, 2, 5, 10), integer=x_label in COUNTS))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
        axes.set_xlabel(x_label, loc="right", labelpad=1)
        axes.set_ylabel(y_label)
        paint(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    return text[text.index("<svg") :]
