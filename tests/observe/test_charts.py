import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from align_cluster.observe.charts import MAX_POINTS, PALETTE, Series, line_chart, scatter_chart, stacked_chart
from align_cluster.observe.report import place

SVG = "{http://www.w3.org/2000/svg}"
SIZE, KINDS = (300, 160), ("muted", "accent")


def shapes(svg: str, kind: str, colour: str) -> list[dict[str, str]]:
    """Attributes of the elements `kind` that are drawn in a colour of the palette, without what only defines a dot."""
    found = [element.attrib for element in ElementTree.fromstring(svg).iter(SVG + kind)]
    return [one for one in found if PALETTE[colour] in one.get("style", "") and "id" not in one]


def coordinates(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def test_a_gap_lifts_the_pen():
    svg = line_chart([Series("a", [(1, 0.1), (2, None), (3, 0.3), (4, 0.2)])], SIZE)
    (line,) = shapes(svg, "path", "accent")
    assert line["d"].count("M") == 2 and line["d"].count("L") == 1


def test_odd_curves_give_a_picture_without_nan():
    for points in ([(3, 0.5)], [(1, 0.0), (2, 0.0)], [(1, None), (2, 5e8)], [(0, -1.0), (9, 1e-9)], [(1, None)], []):
        for smooth in (1, 3):
            svg = line_chart([Series("a", points)], SIZE, smooth, from_zero=True)
            assert ElementTree.fromstring(svg).tag == SVG + "svg" and "nan" not in svg
    assert "nan" not in scatter_chart([Series("a", [(0.0, None)])], SIZE, "x", "y")


def test_several_lines_carry_their_names_and_no_name_is_read_as_markup_or_a_formula():
    names = ["a < b", "_hidden", "$\\frac{$", "<script>"]
    lines = [Series(name, [(0, 0.1 * i), (10, 0.2)], f"stage-{i}") for i, name in enumerate(names)]
    svg = line_chart(lines, SIZE, y_label="score")
    texts = {text.strip() for text in ElementTree.fromstring(svg).itertext()}
    assert {"step", "score", "0", "10", *names} <= texts and "<script>" not in svg


def test_a_long_line_shows_averages_of_neighbours_up_to_its_last_step():
    points = [(step, float(step % 2)) for step in range(1000)]
    (line,) = shapes(line_chart([Series("a", points)], SIZE, ys=(0.0, 1.0)), "path", "accent")
    drawn = coordinates(line["d"])
    assert 20 < len(drawn) <= MAX_POINTS
    assert all(y == pytest.approx(14 + (160 - 14 - 30) / 2, abs=10) for _, y in drawn)  # 0.5 on an axis from 0 to 1
    right = 300 - 12  # where the axes end, with the usual air before it
    assert drawn[-1][0] == pytest.approx(right - (right - 42) * 0.05 / 1.1, abs=1)


def test_stacked_layers_are_as_high_as_their_values_also_with_one_step():
    for steps in ([5], [5, 6]):
        svg = stacked_chart(steps, {"a": [1.0] * len(steps), "b": [3.0] * len(steps)}, SIZE)
        heights = []
        for layer in ("stage-0", "stage-1"):
            (area,) = shapes(svg, "path", layer)
            ys = [y for _, y in coordinates(area["d"])]
            heights.append(max(ys) - min(ys))
        assert heights[1] == pytest.approx(3 * heights[0], abs=0.2)
        assert sum(heights) == pytest.approx((160 - 14 - 30) / 1.06, abs=0.2)


def test_a_scatter_has_a_dot_a_point_and_equal_axes():
    series = [Series("noisy", [(0.0, 1.0), (2.0, None)], "muted"), Series("clean", [(2.0, 2.0), (1.0, 1.0)])]
    svg = scatter_chart(series, (300, 300), "reward", "value")
    noisy, clean = ([(float(dot["x"]), float(dot["y"])) for dot in shapes(svg, "use", kind)][:-1] for kind in KINDS)
    assert (len(noisy), len(clean)) == (1, 2)  # the last one of each stands in the legend
    plot = (300 - 58 - 12) / 2.2, (300 - 14 - 30) / 2.2  # pixels of a unit: 0 to 2, and a twentieth of it at each end
    assert clean[0][0] - clean[1][0] == pytest.approx(plot[0], abs=0.1)
    assert clean[1][1] - clean[0][1] == pytest.approx(plot[1], abs=0.1)
    assert {"noisy", "clean", "reward", "value"} <= {text.strip() for text in ElementTree.fromstring(svg).itertext()}


def test_a_chart_depends_on_its_numbers_alone_and_leaves_the_users_matplotlib_as_it_is():
    import matplotlib

    lines = [Series("a", [(1, 0.5), (2, 0.75)])]
    first = line_chart(lines, SIZE)
    with matplotlib.rc_context({"font.size": 30, "text.usetex": True, "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        assert line_chart(lines, SIZE) == first
        assert dict(matplotlib.rcParams) == before
    assert "date" not in first.lower()


def test_matplotlib_loads_with_the_first_chart_and_its_global_figures_never():
    code = """
import sys
import align_cluster.observe.report
from align_cluster.observe.charts import Series, line_chart
assert "matplotlib" not in sys.modules
line_chart([Series("a", [(1, 0.5)])], (300, 160))
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bars_start_at_zero_also_for_negative_scores():
    assert place(0, -1.0, (-1.0, 1.0)) == "left:0.0%;width:50.0%"
    assert place(0, 0.5, (-1.0, 1.0)) == "left:50.0%;width:25.0%"
