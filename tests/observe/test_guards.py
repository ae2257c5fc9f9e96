import json

import pytest

from align_cluster.errors import UserError
from align_cluster.observe.guards import Guard, GuardConfig
from align_cluster.rewards.base import RewardSection
from align_cluster.types import Failure

OFF = {name: None for name in GuardConfig.model_fields if name != "rollbacks"}


def guard(**rules) -> Guard:
    return Guard(GuardConfig.model_validate(OFF | rules), ["clip"])


def alarms(made: Guard, rows: list[dict]) -> list[tuple[int, str, str]]:
    """(step, rule, action) of every alarm."""
    found = [(step, made.watch(step, row)) for step, row in enumerate(rows, start=1)]
    return [(step, alarm.rule, alarm.action) for step, alarm in found if alarm]


def test_a_healthy_run_raises_nothing_under_the_default_rules():
    made = Guard(GuardConfig(), ["clip"])
    rows = [
        {
            "reward/clip/mean": 0.2 + 0.01 * step,
            "reward/clip/std": 0.1,
            "train/grad_norm": 1 + step % 3,
            "group/zero_std_ratio": 0.5,
            "images/contrast": 0.2,
            "images/diversity": 0.1,
        }
        for step in range(40)
    ]
    assert not alarms(made, rows) and made.good


def test_a_rule_waits_for_its_patience_and_speaks_once_a_streak():
    made = guard(zero_std={"limit": 0.9, "patience": 3, "action": "stop"})
    ratios = [1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1]
    assert alarms(made, [{"group/zero_std_ratio": ratio} for ratio in ratios]) == [
        (6, "zero_std", "stop"),
        (11, "zero_std", "stop"),
    ]
    assert not made.good


def test_skipped_updates_are_counted_a_step():
    made = guard(not_finite={"limit": 1, "patience": 2, "action": "stop"})
    assert alarms(made, [{"train/skipped": n} for n in (0, 1, 0, 1, 2)]) == [(5, "not_finite", "stop")]


def test_a_reward_that_falls_is_measured_in_deviations_of_its_first_images():
    made = guard(reward_drop={"limit": 1.0, "patience": 1, "action": "rollback"})
    rows = [{"reward/clip/mean": mean, "reward/clip/std": 0.1} for mean in [0.5] * 5 + [0.45] * 6 + [0.3] * 5]
    # Means of 5: down to 0.45 (half a deviation), then 0.39 as soon as two of five are 0.3.
    assert alarms(made, rows) == [(13, "reward_drop", "rollback")]


def test_a_gradient_is_compared_with_those_before_it():
    made = guard(grad_norm={"limit": 10, "patience": 1, "action": "warn"})
    norms = [1, 2, 1, 2, 1, 9, 15, 2]
    assert alarms(made, [{"train/grad_norm": norm} for norm in norms]) == [(7, "grad_norm", "warn")]


def test_images_that_turn_grey_or_alike_are_compared_with_the_first_step():
    for name in ("contrast", "diversity"):
        made = guard(**{name: {"limit": 0.5, "patience": 2, "action": "rollback"}})
        found = alarms(made, [{f"images/{name}": value} for value in (0.2, 0.11, 0.09, 0.08)])
        assert found == [(4, name, "rollback")]


def test_the_strictest_alarm_counts():
    made = guard(
        zero_std={"limit": 0.9, "patience": 1, "action": "warn"},
        not_finite={"limit": 1, "patience": 1, "action": "stop"},
    )
    assert alarms(made, [{"group/zero_std_ratio": 1.0, "train/skipped": 1.0}]) == [(1, "not_finite", "stop")]


def test_the_sentence_has_the_step_the_number_the_setting_and_what_the_rule_watches():
    assert guard(grad_norm={"limit": 10, "patience": 1}).watch(1, {}) is None
    made = guard(zero_std={"limit": 0.9, "patience": 1})
    assert made.watch(7, {"group/zero_std_ratio": 0.95}).message == (
        "step 7: zero_std is 0.95, for 1 steps at or above guard.zero_std.limit 0.9 (watches the share of groups whose "
        "images all score the same, so that they teach nothing)"
    )


def test_a_guard_that_is_taken_up_again_goes_on_as_if_nothing_had_been():
    rows = [
        {
            "reward/clip/mean": 0.5 - 0.02 * step,
            "reward/clip/std": 0.1,
            "train/grad_norm": 1.0 + step,
            "group/zero_std_ratio": 1.0,
            "images/contrast": 0.2 / (1 + step),
        }
        for step in range(16)
    ]
    whole = Guard(GuardConfig(), ["clip"])
    expected = alarms(whole, rows)
    for cut in range(len(rows)):
        first, second = Guard(GuardConfig(), ["clip"]), Guard(GuardConfig(), ["clip"])
        before = alarms(first, rows[:cut])
        second.restore(json.loads(json.dumps(first.state())))
        after = [(step + cut, rule, action) for step, rule, action in alarms(second, rows[cut:])]
        assert before + after == expected and second.state() == whole.state()
    assert {rule for _, rule, _ in expected} == {"zero_std", "contrast", "reward_drop"}


def test_after_a_rollback_what_was_seen_of_later_weights_counts_no_more():
    made = guard(reward_drop={"limit": 1.0, "patience": 1, "action": "rollback"})
    rows = [{"reward/clip/mean": mean, "reward/clip/std": 0.1} for mean in [0.5] * 5 + [0.2] * 5]
    assert alarms(made, rows)
    made.rolled_back()
    assert made.good and not alarms(made, [{"reward/clip/mean": 0.45, "reward/clip/std": 0.1}] * 6)


LATE = {"clip": Failure("timeout", "TimeoutError: no answer in 60 s", (0, 1))}


def rewards(stop_after: int | None) -> dict[str, RewardSection]:
    return {"clip": RewardSection(on_failure={"stop_after": stop_after}), "seen": RewardSection(role="monitor")}


def test_a_reward_without_scores_ends_the_run_with_its_own_error_after_that_many_steps_in_a_row():
    made = guard()
    for step, failures in enumerate((LATE, LATE, {}, LATE, LATE), start=1):
        made.require_scores(step, failures, rewards(3))
        assert made.good == (not failures)
    resumed = guard()
    resumed.restore(json.loads(json.dumps(made.state())))
    sentence = (
        r"^step 6: rewards\.clip has no score for any image in 3 steps in a row "
        r"\(timeout: TimeoutError: no answer in 60 s\); mend what it says, or set rewards\.clip\.on_failure\.stop_after"
    )
    with pytest.raises(UserError, match=sentence):
        resumed.require_scores(6, LATE, rewards(3))


def test_a_run_goes_on_without_scores_where_that_is_wanted():
    made = guard()
    for step in range(20):
        made.require_scores(step, LATE, rewards(None))


def test_samples_that_are_not_finite_count_where_they_leave_an_update_without_any():
    rows = [{"rollout/non_finite": n, "train/empty": empty} for n, empty in ((1, 0), (0, 1), (8, 1), (8, 1))]
    assert alarms(guard(not_finite={"patience": 2, "action": "stop"}), rows) == [(4, "not_finite", "stop")]
