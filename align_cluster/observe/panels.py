"""Parts of report.html: a metric's curve in a panel with its title, and a sample grid inside the page."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from align_cluster.observe.charts import PALETTE, Point, Series, line_chart, smoothing
from align_cluster.observe.metrics import describe
from align_cluster.observe.rundata import RunData

WIDE, SMALL = (620, 200), (300, 160)  # sizes of charts; the page scales them to its panels
COLOURS = ("accent", "stage-1")  # of the first run of a page, and of the second
FROM_ZERO = ("fraction", "s", "bytes", "images/s")  # units whose axis begins at zero
GRID_WIDTH, GRID_BYTES = 1280, 750_000  # a grid of more bytes is embedded as a JPEG of this width


@dataclass(frozen=True)
class Panel:
    """One framed chart with its caption.

    `name` is the metric's, and `note` stands behind it. `values` are the first and the last number of each run as text;
    `lost` counts the steps whose value was not finite.
    """

    title: str
    name: str
    chart: Markup
    unit: str = ""
    note: str = ""
    values: str = ""
    lost: int = 0
    wide: bool = False


def metric_panel(
    runs: Sequence[RunData], name: str, wide: bool = False, ys: tuple[float, float] | None = None
) -> Panel:
    """Return the curve of one metric in each run; a name that another version wrote has no unit and no other title."""
    try:
        unit, title = describe(name).unit, _title(name)
    except ValueError:
        unit, title = "", name
    points = [run.points(name) for run in runs]
    window = 1 if name == "lr" else smoothing(max(len(run.rows) for run in runs))
    lines = [Series("", one, colour) for one, colour in zip(points, COLOURS, strict=False) if one]
    chart = line_chart(lines, WIDE if wide else SMALL, window, ys, unit in FROM_ZERO)
    lost = sum(y is None for one in points for _, y in one)
    values = " | ".join(filter(None, map(_first_and_last, points)))
    return Panel(title, name, inline(chart), unit, values=values, lost=lost, wide=wide)


def _title(name: str) -> str:
    """Return a metric's meaning after what its name adds to it, such as "geneval: mean over ..."."""
    metric = describe(name)
    about = [part for part, want in zip(name.split("/"), metric.pattern.split("/"), strict=True) if want[0] == "<"]
    return f"{', '.join(about)}: {metric.meaning}" if about else metric.meaning[0].upper() + metric.meaning[1:]


def _first_and_last(points: Sequence[Point]) -> str:
    known = [f"{y:.3g}" for _, y in points if y is not None]
    return " → ".join([*known[:1], *known[1:][-1:]])


def inline(chart: str) -> Markup:
    """Return a chart whose colours are the page's variables, so that they follow the reader's light or dark theme."""
    for name, colour in PALETTE.items():
        chart = chart.replace(colour, f"var(--{name})")
    chart = re.sub(r' xmlns(:xlink)?="[^"]*"', "", chart)
    return Markup(re.sub(r'<g id="[^"]*">', "<g>", chart))


def picture(path: Path, title: str) -> dict[str, str | tuple[int, int]]:
    """Return a sample grid as a data URI with its title and size; a large one becomes a smaller JPEG."""
    data, kind = path.read_bytes(), "png"
    image = Image.open(io.BytesIO(data))
    if len(data) > GRID_BYTES:
        image = image.convert("RGB")
        image.thumbnail((GRID_WIDTH, 20 * GRID_WIDTH))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88)
        data, kind = buffer.getvalue(), "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"title": title, "source": source, "size": image.size}
