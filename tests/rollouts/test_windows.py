import math
import random
from collections import Counter

import pytest
from pydantic import ValidationError

from align_cluster.rollouts.windows import WINDOWS, FastWindow, FractionWindow, SlidingWindow, Window

from ..cases import each


def fraction(**settings) -> FractionWindow:
    return FractionWindow(FractionWindow.Config(**settings))


def sliding(**settings) -> SlidingWindow:
    return SlidingWindow(SlidingWindow.Config(**settings))


def fast(**settings) -> FastWindow:
    return FastWindow(FastWindow.Config(**settings))


EVERY = [
    fraction(),
    fraction(fraction=0.4, choice="random"),
    fraction(fraction=0.6, choice="per_sample"),
    sliding(),
    sliding(size=3, stride=2, strategy="random"),
    sliding(strategy="decay", iters_per_group=3, max_iters=3, min_iters=1),
    sliding(strategy="exp_decay", iters_per_group=2, roll_back=False),
    fast(),
    fast(size=3, range=(1, 5)),
]


def by_hand(iters, size: int, stride: int, roll_back: bool, steps: int, count: int) -> list[tuple[int, ...]]:
    """The windows of `count` training steps, by the counters that MixGRPO keeps between them."""
    last_trainable, start, counter, windows = steps - 2, 0, 0, []
    for _ in range(count):
        windows.append(tuple(range(start, min(start + size, last_trainable + 1))))
        counter += 1
        if counter >= iters(start, last_trainable):
            counter = 0
            if start + stride <= last_trainable:
                start += stride
            elif roll_back:
                start = 0
    return windows


@each("window", EVERY)
@each("steps", [6, 10, 25])
def test_every_plan_is_ascending_repeatable_within_its_width_and_never_trains_the_terminal_step(window, steps):
    assert window.problem(steps) is None
    for step in range(120):
        plan = window.plan(steps, step, 1000 + step)
        assert plan == type(window)(window.config).plan(steps, step, 1000 + step)
        assert plan.trained == tuple(sorted(set(plan.trained))) and plan.noisy == tuple(sorted(set(plan.noisy)))
        assert set(plan.trained) <= set(plan.noisy) and max(plan.trained) < steps - 1
        assert 1 <= plan.keep <= len(plan.trained) and plan.keep <= window.width(steps)
        if window.config.kind != "fraction":
            assert plan.noisy == plan.trained and plan.keep == len(plan.trained)
    assert max(window.plan(steps, step, step).keep for step in range(120)) == window.width(steps)


def test_flow_grpo_trains_nine_of_ten_steps_and_all_ten_are_noisy():
    assert fraction().plan(10, 5, 0) == Window(tuple(range(10)), tuple(range(9)), 9)


@each(("part", "steps", "count"), [(0.99, 10, 9), (1.0, 10, 9), (0.4, 10, 4), (0.01, 10, 1), (1, 2, 1)])
def test_a_fraction_counts_in_all_steps(part, steps, count):
    assert fraction(fraction=part).plan(steps, 0, 3).trained == tuple(range(count))
    drawn = fraction(fraction=part, choice="random")
    assert drawn.width(steps) == len(drawn.plan(steps, 0, 3).trained) == drawn.plan(steps, 0, 3).keep == count


def test_a_random_fraction_is_the_seeds_own_and_reaches_every_step_but_the_last():
    window = fraction(fraction=0.4, choice="random")
    draws = [window.plan(10, 0, seed).trained for seed in range(300)]
    assert draws == [tuple(sorted(random.Random(seed).sample(range(9), 4))) for seed in range(300)]
    assert set().union(*draws) == set(range(9)) and len(set(draws)) > 50
    assert {window.plan(10, step, 7).trained for step in range(20)} == {draws[7]}


@each(("part", "steps", "keep"), [(0.6, 16, 9), (0.5, 10, 4), (1.0, 50, 49), (0.6, 2, 1), (0.01, 16, 1)])
def test_per_sample_keeps_dancegrpos_share_of_the_steps_that_can_be_trained(part, steps, keep):
    window = fraction(fraction=part, choice="per_sample")
    assert window.plan(steps, 0, 0) == Window(tuple(range(steps)), tuple(range(steps - 1)), keep)
    assert window.width(steps) == keep


def test_mixgrpos_published_window_moves_a_step_every_25_and_starts_again():
    window = sliding()
    assert window.plan(25, 24, 0).trained == (0, 1, 2, 3) and window.plan(25, 25, 0).trained == (1, 2, 3, 4)
    assert window.plan(25, 20 * 25, 0).trained == (20, 21, 22, 23)
    assert window.plan(25, 23 * 25, 0).trained == (23,)
    assert window.plan(25, 24 * 25, 0).trained == (0, 1, 2, 3)


@each("roll_back", [True, False])
@each(("size", "stride"), [(4, 1), (4, 4), (3, 2), (1, 1), (2, 7)])
@each("strategy", ["progressive", "decay", "exp_decay"])
def test_sliding_plans_are_those_of_counters_kept_from_step_to_step(strategy, size, stride, roll_back):
    def iters(start: int, last: int) -> float:
        if strategy == "decay":
            return int(7 * (1 - start / last) + 2 * start / last)
        return 5 * math.exp(-0.1 * max(start - 13, 0)) if strategy == "exp_decay" else 5

    window = sliding(
        size=size, stride=stride, iters_per_group=5, strategy=strategy, max_iters=7, min_iters=2, roll_back=roll_back
    )
    plans = [window.plan(25, step, 0).trained for step in range(400)]
    assert plans == by_hand(iters, size, stride, roll_back, 25, 400)
    last = max(plan[0] for plan in plans)
    assert (plans[-1][0] == last) if not roll_back else plans.count(plans[0]) > 5


def test_decay_stays_long_at_the_start_and_briefly_at_the_end():
    window = sliding(strategy="decay", max_iters=10, min_iters=1)
    starts = [window.plan(6, step, 0).trained[0] for step in range(27)]
    assert starts == [0] * 10 + [1] * 7 + [2] * 5 + [3] * 3 + [4] + [0]


def test_exponential_decay_begins_at_start_13_and_never_skips_a_start():
    window = sliding(strategy="exp_decay", iters_per_group=25)
    assert [window.iters(start, 48) for start in (0, 13, 14, 23, 48)] == [25, 25, 23, 10, 1]


def test_a_random_sliding_window_is_full_and_starts_anywhere_with_equal_chance():
    window = sliding(strategy="random")
    starts = Counter(window.plan(10, 3, seed).trained[0] for seed in range(3000))
    assert set(starts) == set(range(6))
    assert all(abs(count - 500) < 5 * math.sqrt(500) for count in starts.values())
    assert all(len(window.plan(10, 3, seed).trained) == 4 for seed in range(100))


@each(
    ("settings", "steps", "low", "high"),
    [({}, 10, 0, 5), ({"size": 3}, 10, 0, 5), ({"range": (2, 9)}, 10, 2, 9), ({"size": 1}, 2, 0, 1)],
)
def test_a_fast_window_starts_anywhere_in_its_range_that_it_fits(settings, steps, low, high):
    window = fast(**settings)
    size = window.width(steps)
    starts = {window.plan(steps, 0, seed).trained[0] for seed in range(300)}
    assert starts == set(range(low, high - size + 1))
    start = random.Random(5).randint(low, high - size)
    assert window.plan(steps, 0, 5) == Window(*[tuple(range(start, start + size))] * 2, size)


@each(
    ("window", "steps", "sentence"),
    [
        (
            sliding(size=12),
            10,
            "rollout.window.size is 12, and a rollout of 10 steps has 9 that can be trained; set it to at most 9",
        ),
        (
            fast(size=4),
            6,
            "rollout.window.size is 4, and the first half of a rollout of 6 steps has 3; set it to at most 3",
        ),
        (
            fast(range=(4, 5)),
            10,
            "rollout.window.size is 2, and rollout.window.range has 1; set it to at most 1",
        ),
        (
            fast(range=(4, 10)),
            10,
            "rollout.window.range ends at 10, and a rollout of 10 steps has 9 that can be trained; "
            "let it end at 9 or before",
        ),
        (
            fast(range=(4, 4)),
            10,
            "rollout.window.range is [4, 4], which holds no step; its end must lie above its start",
        ),
    ],
)
def test_a_window_that_does_not_fit_is_named_with_what_to_do(window, steps, sentence):
    assert window.problem(steps) == sentence


@each(("window", "steps"), [(sliding(size=9), 10), (fast(size=3), 6), (fast(range=(7, 9)), 10)])
def test_a_window_that_just_fits_has_no_problem(window, steps):
    assert window.problem(steps) is None
    assert all(max(window.plan(steps, step, step).trained) < steps - 1 for step in range(50))


@each(
    ("kind", "settings"),
    [
        ("fraction", {"fraction": 0}),
        ("fraction", {"fraction": 1.1}),
        ("sliding", {"size": 0}),
        ("fast", {"range": [-1, 3]}),
    ],
)
def test_settings_out_of_bounds_are_refused(kind, settings):
    with pytest.raises(ValidationError):
        WINDOWS[kind].Config(**settings)
