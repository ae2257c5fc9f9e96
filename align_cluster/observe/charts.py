"""Charts as SVG text, for the report: no library, no script, colours from the page's style sheet.

A point is (x, y); y None is a gap. Labels are escaped here, so callers hand over plain text.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float | None]

POINTS = 160  # more than this in one line is averaged: a chart has some 250 pixels
CHAR, LINE = 6.0, 12.0  # width of a label's letter and distance of two labels, in chart pixels


@dataclass(frozen=True)
class Series:
    """One line. `kind` is its class in the style sheet; `band` holds (x, low, high) of an interval."""

    label: str
    points: Sequence[Point]
    kind: str = "accent"
    band: Sequence[tuple[float, float, float]] = ()


@dataclass
class Frame:
    """A plot area inside a width x height picture, and the two scales."""

    width: int
    height: int
    xs: tuple[float, float]
    ys: tuple[float, float]
    right: float = 12
    left: float = 46
    top: float = 20
    bottom: float = 34
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.xs
        return round(self.left + (value - low) / (high - low) * (self.width - self.left - self.right), 1)

    def y(self, value: float) -> float:
        low, high = self.ys
        return round(self.height - self.bottom - (value - low) / (high - low) * self.plot_height, 1)

    @property
    def plot_height(self) -> float:
        return self.height - self.top - self.bottom

    def add(self, *parts: str) -> None:
        self.parts.extend(parts)

    def axes(self, x_label: str, y_label: str, steps: Sequence[float]) -> None:
        """Horizontal grid lines with their values, marks for `steps`, and what the two axes measure."""
        edge = self.width - self.right
        for value, text in labelled(ticks(*self.ys, 4)):
            y = self.y(value)
            self.add(f'<line class="grid" x1="{self.left}" x2="{edge}" y1="{y}" y2="{y}"/>')
            self.add(f'<text class="tick" x="{self.left - 6}" y="{y + 3.5}" text-anchor="end">{text}</text>')
        base = self.height - self.bottom
        for value in steps:
            x = self.x(value)
            self.add(f'<line class="axis" x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}"/>')
            self.add(f'<text class="tick" x="{x}" y="{base + 15}" text-anchor="middle">{number(value)}</text>')
        self.add(f'<line class="axis" x1="{self.left}" x2="{edge}" y1="{base}" y2="{base}"/>')
        self.add(f'<text class="unit" x="{edge}" y="{self.height - 4}" text-anchor="end">{escape(x_label)}</text>')
        self.add(f'<text class="unit" x="4" y="10">{escape(y_label)}</text>')

    def svg(self, name: str) -> str:
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(name)}">'
            + "".join(self.parts)
            + "</svg>"
        )


def number(value: float) -> str:
    """Three significant digits, short: 0.612, 12.3, 4.1k, 2e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1000 if letter == 'k' else limit):.3g}{letter}"
    if size >= 100:
        return f"{value:.0f}"
    text = f"{value:.1e}" if size < 1e-3 else f"{value:.3g}"
    return text.replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values in [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(1, count)
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def labelled(values: list[float]) -> list[tuple[float, str]]:
    """Tick values with labels of one precision."""
    size = max((abs(value) for value in values), default=0)
    if len(values) < 2 or size >= 1e4 or size < 1e-2:
        return [(value, number(value)) for value in values]
    digits = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))
    return [(value, f"{value:.{digits}f}") for value in values]


def span(values: Sequence[float], from_zero: bool = False) -> tuple[float, float]:
    """An axis range around `values` with some air, from zero where that is near; a constant lies in the middle."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    from_zero = from_zero or 0 < low < 0.25 * high
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-12):
        pad = abs(high) * 0.1 or 1.0
        return (0.0 if from_zero and low == 0 else low - pad), high + pad
    air = 0.06 * (high - low)
    return (low if from_zero and low == 0 else low - air), high + air


def thin(points: Sequence[Point], limit: int = POINTS) -> list[Point]:
    """Averages of equal runs of points, at most `limit` of them; x is the run's last."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / limit)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(run[-1][0], mean(y for _, y in run)) for run in runs]


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Mean over the last `window` points."""
    return [
        (x, mean([value for _, value in points[max(0, index + 1 - window) : index + 1]]))
        for index, (x, _) in enumerate(points)
    ]


def line_chart(
    name: str,
    series: list[Series],
    unit: str,
    width: int,
    height: int,
    from_zero: bool = False,
    smooth: int = 1,
    ys: tuple[float, float] | None = None,
) -> str:
    """Lines over steps. Several lines carry their names at their right end; a single one shows its last value there.

    `smooth` > 1 draws each point faintly and the mean of the last `smooth` points boldly. `ys` fixes the y range.
    """
    lines = [(one, thin(one.points), thin(running_mean(one.points, smooth))) for one in series]
    known = [y for _, points, _ in lines for _, y in points if y is not None]
    known += [bound for one in series for _, *bounds in one.band for bound in bounds]
    xs = [x for _, points, _ in lines for x, _ in points]
    if not known:
        return '<p class="note">no finite values</p>'
    low, high = min(xs), max(xs)
    right = 14 + CHAR * (max(len(one.label) for one in series) if len(series) > 1 else 7)
    frame = Frame(width, height, (low, high if high > low else low + 1), ys or span(known, from_zero), right)
    frame.axes("step", unit, step_ticks(xs, width))
    ends = []
    for one, points, bold in lines:
        if one.band:
            upper = [f"{frame.x(x)},{frame.y(top)}" for x, _, top in one.band]
            lower = [f"{frame.x(x)},{frame.y(bottom)}" for x, bottom, _ in reversed(one.band)]
            frame.add(f'<polygon class="band {one.kind}" points="{" ".join(upper + lower)}"/>')
        if smooth > 1:
            frame.add(f'<path class="line faint {one.kind}" d="{path(frame, points)}"/>')
        frame.add(f'<path class="line {one.kind}" d="{path(frame, bold)}"/>')
        last = next((point for point in reversed(bold) if point[1] is not None), None)
        if last:
            ends.append((frame.y(last[1]), one, last))
            frame.add(f'<circle class="dot {one.kind}" cx="{frame.x(last[0])}" cy="{frame.y(last[1])}" r="2.6"/>')
        frame.add(*(_hover(frame, one.label, x, y) for x, y in points if y is not None))
    texts = [one.label if len(series) > 1 else number(last[1]) for _, one, last in ends]
    places = apart([y for y, _, _ in ends], LINE, frame.top, height - frame.bottom)
    for place, text, (_, one, last) in zip(places, texts, ends, strict=True):
        frame.add(f'<text class="end {one.kind}" x="{frame.x(last[0]) + 7}" y="{place + 3.5}">{escape(text)}</text>')
    return frame.svg(name)


def scatter_chart(name: str, series: list[Series], x_label: str, y_label: str, width: int, height: int) -> str:
    """Points without lines, and the diagonal where y is x. Series are told apart by their kind."""
    known = [(x, y) for one in series for x, y in one.points if y is not None]
    if not known:
        return '<p class="note">no finite values</p>'
    both = span([value for point in known for value in point])
    frame = Frame(width, height, both, both)
    frame.axes(x_label, y_label, ticks(*both, max(2, width // 75)))
    frame.add(f'<path class="line faint" d="{path(frame, [(both[0], both[0]), (both[1], both[1])])}"/>')
    for one in series:
        places = ((frame.x(x), frame.y(y)) for x, y in one.points if y is not None)
        frame.add(*(f'<circle class="dot {one.kind}" cx="{x}" cy="{y}" r="2.2" opacity="0.6"/>' for x, y in places))
    labels = enumerate(series) if len(series) > 1 else ()
    for line, one in labels:
        place = frame.top + 10 + LINE * line
        frame.add(f'<text class="end {one.kind}" x="{frame.left + 8}" y="{place}">{escape(one.label)}</text>')
    return frame.svg(name)


def step_ticks(xs: Sequence[float], width: int) -> list[float]:
    """Whole-numbered marks for steps, some 70 pixels apart."""
    low, high = min(xs), max(xs)
    if high == low:
        return [low]
    return [value for value in ticks(low, high, max(2, width // 75)) if value == round(value)]


def path(frame: Frame, points: Sequence[Point]) -> str:
    """SVG path through the points; a gap lifts the pen."""
    commands, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
        else:
            commands.append(f"{pen}{frame.x(x)} {frame.y(y)}")
            pen = "L"
    return "".join(commands)


def _hover(frame: Frame, label: str, x: float, y: float) -> str:
    text = f"{label}, step {number(x)}: {number(y)}"
    return f'<circle class="hit" cx="{frame.x(x)}" cy="{frame.y(y)}" r="5"><title>{escape(text)}</title></circle>'


def apart(places: list[float], distance: float, low: float, high: float) -> list[float]:
    """`places` moved as little as needed so that no two are closer than `distance`, inside [low, high]."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, here in zip(order, order[1:], strict=False):
        moved[here] = max(moved[here], moved[before] + distance)
    limit = high
    for here in reversed(order):
        moved[here] = min(moved[here], limit)
        limit = moved[here] - distance
    return [max(low, place) for place in moved]


def stacked_chart(
    name: str, steps: list[float], layers: dict[str, list[float]], unit: str, width: int, height: int
) -> str:
    """One bar a step, cut into layers from the bottom up; layer i has the style class `stage-i`."""
    bars = [(step, [values[index] for values in layers.values()]) for index, step in enumerate(steps)]
    if len(bars) > POINTS:
        size = math.ceil(len(bars) / POINTS)
        runs = [bars[start : start + size] for start in range(0, len(bars), size)]
        bars = [(run[-1][0], [sum(part) / len(run) for part in zip(*(b for _, b in run), strict=True)]) for run in runs]
    top = max(sum(parts) for _, parts in bars)
    low, high = bars[0][0], bars[-1][0]
    half = (high - low) / (len(bars) - 1) / 2 if len(bars) > 1 else 0.5
    frame = Frame(width, height, (low - half, high + half), (0.0, top * 1.06 or 1.0))
    frame.axes("step", unit, step_ticks([bar[0] for bar in bars], width))
    room = (width - frame.left - frame.right) / len(bars)
    bar_width = round(min(26.0, room * 0.82), 2)
    for step, parts in bars:
        x, base = frame.x(step) - bar_width / 2, 0.0
        for layer, (label, part) in enumerate(zip(layers, parts, strict=True)):
            y, tall = frame.y(base + part), part / frame.ys[1] * frame.plot_height
            base += part
            tip = escape(f"step {number(step)}, {label}: {number(part)} {unit}")
            frame.add(
                f'<rect class="stage-{layer}" x="{x:.1f}" y="{y}" width="{bar_width}" height="{tall:.1f}">'
                f"<title>{tip}</title></rect>"
            )
    return frame.svg(name)


def bars(
    before: float | None, after: float | None, scale: tuple[float, float], interval: Sequence[float] | None = None
) -> str:
    """Two thin bars from zero, before above after, for a table cell; `interval` is a whisker on the second."""
    low, high = scale
    width, height = 200, 20

    def x(value: float) -> float:
        return round((value - low) / (high - low) * width, 1)

    parts = [f'<line class="axis" x1="{x(0)}" x2="{x(0)}" y1="0" y2="{height}"/>']
    for value, kind, y in ((before, "before", 2), (after, "after", 11)):
        if value is not None:
            left = min(x(0), x(value))
            parts.append(
                f'<rect class="{kind}" x="{left}" y="{y}" width="{abs(x(value) - x(0)):.1f}" height="7">'
                f"<title>{kind}: {number(value)}</title></rect>"
            )
    if interval and after is not None:
        parts.append(f'<line class="whisker" x1="{x(interval[0])}" x2="{x(interval[1])}" y1="14.5" y2="14.5"/>')
    return f'<svg class="bars" viewBox="0 0 {width} {height}" preserveAspectRatio="none">{"".join(parts)}</svg>'
