import io
import math

import numpy as np
import pytest
from rich.console import Console

from align_cluster.observe.table import (
    FEW,
    by_prompt,
    compare,
    comparison_table,
    evaluation_tables,
    headline_column,
    paired,
    summarise,
    within_noise,
)


def row(task: str, prompt: int, **scores: float | None) -> dict:
    return {"task": task, "prompt_id": prompt, **scores}


def printed(table) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def test_overall_is_the_mean_of_task_means_not_of_images():
    rows = [row("colors", 0, s=1.0), *(row("counting", i, s=0.0) for i in range(9))]
    scores = summarise(rows)
    assert scores["tasks"] == {"colors": {"s": 1.0}, "counting": {"s": 0.0}}
    assert scores["overall"] == {"s": 0.5}
    assert scores["count"] == 10 and scores["prompts"] == 10


def test_a_failed_score_is_left_out_and_never_a_zero():
    for lost in (None, math.nan):
        scores = summarise([row("a", 0, s=0.8, t=1.0), row("a", 0, s=lost, t=0.0), row("b", 1, s=lost, t=0.5)])
        assert scores["tasks"] == {"a": {"s": 0.8, "t": 0.5}, "b": {"t": 0.5}}
        assert scores["overall"] == {"s": 0.8, "t": 0.5}


def test_a_column_without_any_score_is_absent():
    scores = summarise([row("a", 0, s=0.5, t=None)])
    assert scores["overall"] == {"s": 0.5} and scores["interval"] == {"s": [0.5, 0.5]}


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="no images"):
        summarise([])


def test_the_interval_redraws_prompts_inside_tasks():
    """Against a plain loop that redraws whole prompts, one at a time."""
    rng = np.random.default_rng(5)
    scores = {task: rng.uniform(size=(12, 3)) for task in ("a", "b")}
    rows = [row(t, p, s=v) for t, grid in scores.items() for p, images in enumerate(grid) for v in images]
    redrawn = [np.mean([grid[rng.integers(0, 12, 12)].mean() for grid in scores.values()]) for _ in range(4000)]
    result = summarise(rows, resamples=4000)
    assert result["interval"]["s"] == pytest.approx(np.percentile(redrawn, (2.5, 97.5)), abs=0.01)
    low, high = result["interval"]["s"]
    assert low < result["overall"]["s"] < high


def test_images_of_one_prompt_do_not_narrow_the_interval():
    few = [row("a", p, s=float(p % 2)) for p in range(20)]
    many = [row("a", p, s=float(p % 2)) for p in range(20) for _ in range(10)]
    assert summarise(few)["interval"]["s"] == pytest.approx(summarise(many)["interval"]["s"])


def test_the_interval_depends_on_the_seed_alone():
    rows = [row("a", p, s=p / 30) for p in range(30)]
    assert summarise(rows) == summarise(rows)
    assert summarise(rows, seed=1)["interval"] != summarise(rows)["interval"]


def test_compare_gives_the_change_where_both_sides_have_the_score():
    before = {"overall": {"s": 0.25}, "tasks": {"a": {"s": 0.25}}}
    after = {"overall": {"s": 0.75, "t": 1.0}, "tasks": {"a": {"s": 0.75}, "b": {"t": 1.0}}}
    both = {"before": 0.25, "after": 0.75, "change": 0.5, "interval": None}
    one = {"before": None, "after": 1.0, "change": None, "interval": None}
    assert compare(before, after) == {"overall": {"s": both, "t": one}, "tasks": {"a": {"s": both}, "b": {"t": one}}}
    assert compare(before, {})["overall"]["s"]["change"] is None


def evaluated(rows: list[dict]) -> dict:
    return summarise(rows) | {"by_prompt": by_prompt(rows)}


def test_a_change_is_judged_prompt_by_prompt_however_much_the_prompts_differ():
    """Against the paired normal interval; prompts differ by 30 times the change, and a change of nothing is noise."""
    rng = np.random.default_rng(3)
    levels, noise = rng.normal(0, 1, (2, 40)), rng.normal(0, 0.02, (2, 2, 40, 3))
    sides = [
        evaluated(
            [
                row(task, prompt, s=levels[t, prompt] + better * side + one, none=levels[t, prompt] + one)
                for t, task in enumerate("ab")
                for prompt in range(40)
                for one in noise[side, t, prompt]
            ]
        )
        for side, better in enumerate((0, 0.03))
    ]
    cells = compare(*sides)["overall"]
    changes = 0.03 + (noise[1] - noise[0]).mean(-1)
    spread = 1.96 * (changes.var(axis=1, ddof=1) / 40).sum() ** 0.5 / 2
    low, high = cells["s"]["interval"]
    assert cells["s"]["change"] == pytest.approx(changes.mean(), abs=1e-6)
    assert (low, high) == pytest.approx((changes.mean() - spread, changes.mean() + spread), abs=0.15 * spread)
    assert not within_noise(cells["s"]) and within_noise(cells["none"])
    alone = sides[0]["interval"]["s"]
    assert high - low < 0.05 * (alone[1] - alone[0])


def test_too_few_prompts_are_no_evidence():
    def side(better: float, prompts: int) -> dict:
        rows = [row("a", p, s=p + better) for p in range(20)] + [row("b", p, s=better) for p in range(prompts)]
        return by_prompt(rows)

    enough, few = (paired(side(0, prompts), side(0.5, prompts)) for prompts in (FEW, FEW - 1))
    assert enough["overall"]["s"] == enough["tasks"]["b"]["s"] == pytest.approx([0.5, 0.5])
    assert few == {"overall": {}, "tasks": {"a": {"s": pytest.approx([0.5, 0.5])}, "b": {}}}
    assert within_noise({"change": 0.5, "interval": None}) is None


def test_prompts_without_a_score_on_both_sides_do_not_count():
    old = [row("a", p, s=None if p < 3 else 1.0, t=None) for p in range(10)]
    new = [row("a", p, s=None if p > 7 else 2.0 if p > 2 else 90.0, t=None) for p in range(10)]
    assert paired(by_prompt(old), by_prompt(new))["overall"] == {"s": pytest.approx([1.0, 1.0])}
    assert paired(by_prompt(old), by_prompt([row("b", 0, s=1.0)])) == {"overall": {}, "tasks": {}}
    assert paired({}, by_prompt(new)) == {"overall": {}, "tasks": {}}


def test_the_headline_is_found_with_or_without_its_prefix():
    for wanted, shown in {"reward/clip": "reward/clip", "clip": "reward/clip", "gone": "x", None: "x"}.items():
        assert headline_column(wanted, ["x", "reward/clip"]) == shown
        assert headline_column(wanted, []) is None


def test_the_evaluation_table_shows_tasks_overall_and_interval():
    scores = summarise([row("[bold]a", 0, **{"reward/s": 0.25}), row("b", 1, **{"reward/s": 0.5})])
    text = printed(evaluation_tables(scores, 80))
    for part in ("[bold]a", "0.250", "overall", "0.375", "0.375 – 0.375", "2 images of 2 prompts"):
        assert part in text


def test_scores_that_do_not_fit_beside_each_other_go_below_and_nothing_is_cut():
    names = [f"reward/geneval/a_detail_with_a_long_name_{index}" for index in range(6)]
    scores = summarise([row(task, task, **dict.fromkeys(names, 0.25)) for task in ("single_object", "colors")])
    console = Console(file=io.StringIO(), width=80)
    console.print(evaluation_tables(scores, console.width, "title"))
    text = console.file.getvalue()
    assert "…" not in text and all(name.removeprefix("reward/") in text for name in names)
    assert text.count("overall ") >= 3 and text.count("title") == text.count("2 images of 2 prompts") == 1


def test_the_comparison_table_signs_the_change():
    before, after = (summarise([row("a", 0, s=value)]) for value in (0.5, 0.4))
    assert "-0.100" in printed(comparison_table(before, after, "s"))
    assert "–" in printed(comparison_table(before, {}, "s"))


def test_the_comparison_table_colours_what_is_no_noise():
    rows = [[row("a", p, s=p / 10 + better, t=p % 2 * better) for p in range(20)] for better in (0, 0.5, -0.5)]
    old, *new = (evaluated(side) for side in rows)
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="standard")
    for side, colour, change in zip(new, ("32", "31"), ("+0.500", "-0.500"), strict=True):
        console.print(comparison_table(old, side, "s"))
        assert f"\x1b[{colour}m{change}\x1b[0m" in console.file.getvalue()
    new[0]["by_prompt"]["a"]["s"] = {p: s - 0.5 for p, s in new[0]["by_prompt"]["a"]["s"].items()}
    assert "+0.500 within the noise" in printed(comparison_table(old, new[0], "s"))
    assert "within" not in printed(comparison_table(summarise(rows[0]), summarise(rows[1]), "s"))
