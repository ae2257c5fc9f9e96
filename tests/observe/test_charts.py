import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from align_cluster.observe import charts
from align_cluster.observe.charts import Series


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.6123, "0.612"), (12.34, "12.3"), (4100, "4100"), (12_345, "12.3k"), (3e6, "3M"), (2e-5, "2e-5"),
     (-0.5, "-0.5"), (1_540_096, "1.54M")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert charts.number(value) == text


@pytest.mark.parametrize("low, high", [(0, 1), (0.4831, 0.6212), (-3, 7), (1e-6, 3e-5), (0, 1.5e6), (2, 2.0001)])
def test_ticks_are_round_and_inside(low, high):
    values = charts.ticks(low, high, 4)
    assert 2 <= len(values) <= 6
    assert all(low - 1e-12 <= value <= high * (1 + 1e-9) for value in values)
    step = values[1] - values[0]
    assert min(abs(step / 10 ** math.floor(math.log10(step) + 1e-6) - unit) for unit in (1, 2, 5)) < 1e-3


def test_labels_keep_their_distance_and_their_order():
    places = charts.apart([50, 51, 52, 10, 200], 12, 0, 205)
    order = sorted(places)
    assert all(b - a >= 12 - 1e-9 for a, b in zip(order, order[1:], strict=False))
    assert places[0] < places[1] < places[2] and max(places) <= 205


def test_thinning_keeps_the_mean_and_the_last_step():
    points = [(step, float(step)) for step in range(1000)]
    thinned = charts.thin(points, 100)
    assert len(thinned) == 100 and thinned[-1][0] == 999
    assert sum(y for _, y in thinned) / 100 == pytest.approx(499.5)


def test_a_gap_lifts_the_pen():
    svg = charts.line_chart("n", [Series("a", [(1, 0.1), (2, None), (3, 0.3), (4, 0.2)])], "", 260, 150)
    (line,) = [path for path in ElementTree.fromstring(svg) if path.tag == "path"]
    assert line.attrib["d"].count("M") == 2 and line.attrib["d"].count("L") == 1


@pytest.mark.parametrize(
    "points", [[(3, 0.5)], [(1, 0.0), (2, 0.0)], [(1, None), (2, 5e8)], [(0, -1.0), (9, 1e-9)], [(1, None)], []]
)
def test_odd_curves_give_a_picture_or_a_note(points):
    svg = charts.line_chart("n", [Series("a", points)], "s", 260, 150)
    text = " ".join(ElementTree.fromstring(svg).itertext())
    assert text and "nan" not in svg


def test_axes_carry_units_and_several_lines_their_names():
    lines = [Series("first", [(0, 0.1), (10, 0.2)], "muted"), Series("a < b", [(0, 0.3), (10, 0.4)])]
    texts = list(ElementTree.fromstring(charts.line_chart("n", lines, "score", 360, 220)).itertext())
    assert {"score", "step", "first", "a < b", "0", "10"} <= set(texts)


def test_stacked_bars_fill_the_height_in_proportion():
    svg = charts.stacked_chart("n", [1, 2], {"a": [1.0, 2.0], "b": [3.0, 2.0]}, "s", 760, 220)
    heights = [float(bar.attrib["height"]) for bar in ElementTree.fromstring(svg) if bar.tag == "rect"]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.2)
    assert heights[0] + heights[1] == pytest.approx(heights[2] + heights[3], abs=0.2)


def test_table_bars_start_at_zero_also_for_negative_scores():
    bars = [e for e in ElementTree.fromstring(charts.bars(-1.0, 0.5, (-1.0, 1.0))) if e.tag == "rect"]
    assert [(float(bar.attrib["x"]), float(bar.attrib["width"])) for bar in bars] == [(0, 100), (100, 50)]


def test_a_scatter_has_a_dot_a_point_and_equal_axes():
    series = [Series("noisy", [(0.0, 1.0), (2.0, None)], "muted"), Series("clean", [(2.0, 2.0)], "accent")]
    picture = charts.scatter_chart("value and reward", series, "reward", "value", 300, 300)
    dots = re.findall(r'<circle class="dot (\w+)" cx="([\d.]+)" cy="([\d.]+)"', picture)
    assert [kind for kind, *_ in dots] == ["muted", "accent"]
    assert ">noisy</text>" in picture and ">clean</text>" in picture
    frame = charts.Frame(300, 300, charts.span([0.0, 1.0, 2.0, 2.0]), charts.span([0.0, 1.0, 2.0, 2.0]))
    assert (float(dots[1][1]), float(dots[1][2])) == (frame.x(2.0), frame.y(2.0))
    assert charts.scatter_chart("nothing", [Series("a", [(0.0, None)])], "x", "y", 9, 9).startswith("<p")
