import contextlib
from itertools import combinations
from pathlib import Path

import numpy as np
import papers
import pytest
from papers_draw import apart
from papers_runs import ARMS, ROOT, ROWS, per_prompt, write_prompts
from rows import read
from scipy import stats

from align_cluster.config.load import load


def test_the_interval_is_that_of_variances_estimated_from_all_pairs_of_seeds_and_of_prompts():
    rng = np.random.default_rng(0)
    seeds, prompts = 4, 7
    d = 0.3 * rng.standard_normal((seeds, 1)) + rng.standard_normal(prompts) + rng.standard_normal((seeds, prompts))
    mean, low, high = papers.interval(d)
    both = [combinations(range(size), 2) for size in d.shape]
    both = [list(pairs) for pairs in both]
    rest = np.mean([(d[a, p] - d[a, q] - d[b, p] + d[b, q]) ** 2 / 4 for a, b in both[0] for p, q in both[1]])
    of_seeds = np.mean([(d[a].mean() - d[b].mean()) ** 2 / 2 for a, b in both[0]])  # seeds + rest / prompts
    of_prompts = np.mean([(d[:, p].mean() - d[:, q].mean()) ** 2 / 2 for p, q in both[1]])
    parts = [(of_seeds / seeds, 3), (of_prompts / prompts, 6), (-rest / seeds / prompts, 18)]
    variance = sum(part for part, _ in parts)
    free = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = stats.t.isf(0.025, free) * variance**0.5
    np.testing.assert_allclose([mean, low, high], [d.mean(), d.mean() - half, d.mean() + half], rtol=1e-10)


def test_with_one_seed_or_one_value_a_seed_the_interval_is_the_plain_t_interval():
    d = np.random.default_rng(1).standard_normal(9)
    plain = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    for shaped in (d[None, :], d[:, None]):
        np.testing.assert_allclose(papers.interval(shaped)[1:], plain, rtol=1e-10)
    assert papers.interval(d[None, :1]) == (d[0], -np.inf, np.inf)


@pytest.mark.parametrize("of_seeds", [0.0, 0.2, 1.0])
def test_the_interval_holds_the_truth_as_often_as_it_says_or_more_often_however_much_seeds_differ(of_seeds):
    rng, held = np.random.default_rng(2), 0
    for _ in range(600):
        d = of_seeds * rng.standard_normal((3, 1)) + 0.5 * rng.standard_normal(40) + rng.standard_normal((3, 40))
        _, low, high = papers.interval(d)
        held += low < 0 < high
    assert held / 600 > 0.925  # 2.8 standard errors below .95


@pytest.mark.parametrize(
    ("low", "high", "bound", "expected"),
    [
        (0.01, 0.2, 0.0, "shown"),
        (-0.01, 0.2, 0.0, "not shown"),
        (-0.2, -0.01, 0.0, "refuted"),
        (-0.02, 0.1, -0.03, "shown"),
        (-0.1, -0.04, -0.03, "refuted"),
        (-np.inf, np.inf, 0.0, "not shown"),
    ],
)
def test_the_interval_decides_the_verdict(low, high, bound, expected):
    assert papers.verdict(low, high, bound) == expected


def row(arm: str, seed: int, *evaluations: list[float], flat: float = 0.0, preference: tuple = ()) -> dict:
    held_out = {"geneval/accuracy": [list(scores) for scores in evaluations]}
    held_out |= {"preference": [[value] * 2 for value in preference]} if preference else {}
    steps = {"group/zero_std_ratio": [0.9] * 6 + [flat] * 2}
    return {"arm": arm, "seed": seed, "images": 10, "held_out": held_out, "steps": steps}


def test_arms_are_compared_by_seed_and_prompt_and_judged_once_all_seeds_have_run():
    claim = papers.Claim("a", "says", "accuracy", "new", "old", seeds=(0, 1))
    rows = [row("new", seed, [0, 0], [0.6 + seed / 10, 0.5]) for seed in (1, 0)]
    rows += [row("old", seed, [0, 0], [0.1 + seed / 10, 0.01 * seed]) for seed in (0, 2)]
    found = papers.judge(claim, rows)
    assert found.verdict == "not run" and np.allclose(found.more - found.less, [[0.5, 0.5]])
    rows.append(row("old", 1, [0, 0], [0.2, 0.01]))
    found = papers.judge(claim, rows)
    assert np.allclose(found.more - found.less, [[0.5, 0.5], [0.5, 0.49]]) and found.verdict == "shown"
    assert papers.judge(claim, rows[:2]).verdict == "not run"


def test_the_base_is_the_other_arm_before_its_training_and_late_the_last_quarter_of_its_steps():
    rows = [row("new", seed, [0.2, 0.3], [0.5, 0.7], flat=0.1 * seed) for seed in (0, 1)]
    found = papers.judge(papers.Claim("a", "says", "accuracy", papers.BASE, "new", seeds=(0, 1)), rows)
    assert np.allclose(found.more, [0.2, 0.3]) and np.allclose(found.less, [0.5, 0.7])
    more, less = papers.METRICS["flat groups, late"](rows[1], rows[0])
    assert np.allclose(more, [0.1]) and np.allclose(less, [0.0])


def test_accuracy_at_equal_preference_is_read_where_both_first_have_what_the_weaker_one_reaches():
    slow = row("slow", 0, [0.5, 0.5], [0.4, 0.3], preference=(0.0, 0.2))
    fast = row("fast", 0, [0.5, 0.5], [0.3, 0.5], [0.0, 0.0], preference=(0.1, 0.3, 0.9))
    more, less = papers.at_equal_preference(fast, slow)
    assert np.allclose(more, [0.4, 0.5]) and np.allclose(less, [0.4, 0.3])


def test_rows_keep_prompts_in_one_order_whatever_that_of_the_evaluation():
    first = {"b": {"reward/clip": {"10": 0.1, "9": 0.2}}, "a": {"reward/clip": {"3": 0.3}, "reward/jpeg": {"3": -1.0}}}
    second = {"a": first["a"], "b": {"reward/clip": {"9": 0.2, "10": 0.1}}}
    found = per_prompt([first, second])
    assert found["clip"] == [[0.3, 0.2, 0.1]] * 2 and found["jpeg"] == [[-1.0]] * 2


def test_the_distance_of_images_is_the_mean_over_their_pairs():
    import torch

    seen = torch.nn.functional.normalize(torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    for one, found in zip(seen, apart(seen), strict=True):
        pairs = [1 - float(one[a] @ one[b]) for a, b in combinations(range(4), 2)]
        assert found.item() == pytest.approx(np.mean(pairs), abs=1e-6)


def test_every_claim_has_arms_that_are_valid_run_files(tmp_path):
    for claim in papers.CLAIMS.values():
        assert {claim.more, claim.less} <= {*ARMS, papers.BASE} and claim.metric in papers.METRICS
        assert claim.paper in papers.PAPERS
    write_prompts(tmp_path)
    with contextlib.chdir(tmp_path):
        for arm in ARMS.values():
            load(ROOT / "configs" / f"{arm.config}.yaml", ["seed=1", *arm.settings])


def test_the_readmes_have_the_tables_of_the_rows(tmp_path: Path):
    rows = read(ROWS)
    for file, tables in papers.documents(rows).items():
        copy = tmp_path / "README.md"
        copy.write_text(file.read_text())
        papers.write(copy, tables)
        assert copy.read_text() == file.read_text(), "python benchmarks/papers.py table"
