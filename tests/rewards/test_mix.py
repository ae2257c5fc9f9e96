from dataclasses import replace

import numpy as np
import pytest

from align_cluster.errors import UserError
from align_cluster.rewards.base import RewardSection
from align_cluster.rewards.mix import beside, concatenate, lost, part_of, silent, table, unscored, without
from align_cluster.types import Failure, Scores

NAN = float("nan")


BROKE = Failure("model_error", "it broke", (0,))


def chunk(values, valid=None, failures=None, details=None):
    values = {name: np.array(column, dtype=np.float64) for name, column in values.items()}
    valid = valid or {name: np.isfinite(column) for name, column in values.items()}
    return Scores(values, valid, failures or {}, details or {}, seconds=dict.fromkeys(values, 0.5))


def test_the_table_keeps_chunk_order_and_the_weights_of_trained_rewards():
    rewards = {"a": RewardSection(weight=2.0), "b": RewardSection(weight=-0.5)}
    values, applies, valid, weights = table([chunk({"a": [1, 2], "b": [4, 0]}), chunk({"b": [2], "a": [3]})], rewards)
    np.testing.assert_array_equal(values, [[1, 2, 3], [4, 0, 2]])
    assert weights.tolist() == [2.0, -0.5] and values.dtype == weights.dtype == np.float64
    assert applies.shape == (2, 3) and applies.all() and valid.shape == (3,) and valid.all()


def test_monitors_never_count_not_even_when_they_fail():
    rewards = {"seen": RewardSection(weight=100.0, role="monitor"), "a": RewardSection()}
    broken = chunk({"a": [1, 2], "seen": [NAN, NAN]}, failures={"seen": replace(BROKE, rows=(0, 1))})
    values, applies, valid, weights = table([chunk({"a": [1, 2], "seen": [7, 9]}), broken], rewards)
    np.testing.assert_array_equal(values, [[1, 2, 1, 2]])
    assert applies.all() and valid.all() and weights.tolist() == [1.0]


def test_a_failed_reward_masks_its_images_and_no_others():
    rewards = {"a": RewardSection(), "b": RewardSection()}
    broken = chunk({"a": [1, 2], "b": [NAN, 5]}, failures={"b": BROKE})
    values, applies, valid, _ = table([broken, chunk({"a": [1], "b": [2]})], rewards)
    assert valid.tolist() == [False, True, True]
    np.testing.assert_array_equal(values, [[1, 2, 1], [NAN, 5, 2]])
    assert np.isfinite(values[:, valid]).all()


def test_a_reward_that_does_not_apply_is_left_out_and_masks_nothing():
    rewards = {"objects": RewardSection(), "text": RewardSection(weight=3.0)}
    stray = chunk({"objects": [0.5], "text": [9.0]}, {"objects": np.array([True]), "text": np.array([False])})
    values, applies, valid, _ = table([stray, chunk({"objects": [NAN], "text": [1.0]})], rewards)
    assert applies.tolist() == [[True, False], [False, True]] and valid.all()
    np.testing.assert_array_equal(values, [[0.5, NAN], [NAN, 1.0]])


def test_a_failure_masks_no_image_that_the_reward_does_not_judge():
    """A chunk holds rows of several prompts: reward b fails on the first, and judges the prompt of the second not."""
    rewards = {"a": RewardSection(), "b": RewardSection(on_failure={"then": "drop_group"})}
    mixed = chunk({"a": [1, 2, 3], "b": [NAN, NAN, 5]}, failures={"b": BROKE})
    assert table([mixed], rewards)[2].tolist() == [False, True, True]
    assert lost([mixed], rewards).tolist() == [True, False, False]


def test_parts_of_a_batch_have_their_own_failures_alone_and_make_up_the_whole():
    whole = chunk({"a": [1, NAN, 3, NAN]}, failures={"a": replace(BROKE, rows=(1, 3))}, details={"a/x": np.arange(4.0)})
    parts = [part_of(whole, slice(0, 1)), part_of(whole, slice(1, 3)), part_of(whole, slice(3, 4))]
    assert [part.failures for part in parts] == [{}, {"a": BROKE}, {"a": BROKE}]
    again = concatenate(parts)
    assert again.failures == whole.failures and again.seconds == pytest.approx(whole.seconds)
    for column in ("values", "valid", "details"):
        for name, values in getattr(whole, column).items():
            np.testing.assert_array_equal(getattr(again, column)[name], values)


def test_rows_without_an_image_have_no_score_and_no_failure():
    scores = chunk(
        {"a": [1, NAN, 3], "b": [4, 5, 6]}, failures={"a": replace(BROKE, rows=(1,))}, details={"a/x": [7, 8, 9]}
    )
    assert without(scores, ()) is scores
    found = without(scores, (0, 1))
    assert found.failures == {} and found.valid["b"].tolist() == [False, False, True]
    np.testing.assert_array_equal(found.values["a"], [NAN, NAN, 3])
    np.testing.assert_array_equal(found.details["a/x"], [NAN, NAN, 9])
    rewards = {"a": RewardSection(on_failure={"then": "fail"}), "b": RewardSection()}
    assert table([found], rewards)[2].tolist() == [False, False, True] and not lost([found], rewards).any()


def test_a_trained_reward_that_fails_on_every_image_of_every_chunk_is_silent():
    rewards = {"a": RewardSection(), "b": RewardSection(), "seen": RewardSection(role="monitor")}
    dead = unscored(["a", "seen"], "unavailable", "gone", 2)
    fine = chunk({"b": [1, 2]})
    both = replace(dead, values=dead.values | fine.values, valid=dead.valid | fine.valid)
    assert silent([both, both], rewards) == {"a": Failure("unavailable", "gone", (0, 1, 2, 3))}
    assert silent([both, chunk({"a": [1, NAN], "b": [1, 1], "seen": [1, 1]})], rewards) == {}
    assert silent([chunk({"a": [NAN], "b": [NAN], "seen": [NAN]})], rewards) == {}  # they judge none of the prompts


def test_images_without_any_reward_are_masked_not_zero():
    values, applies, valid, _ = table([chunk({"a": [NAN, 1.0]})], {"a": RewardSection()})
    assert valid.tolist() == [False, True] and applies.tolist() == [[False, True]] and np.isnan(values[0, 0])


def test_only_monitors_is_a_user_error():
    with pytest.raises(UserError, match="role: train"):
        table([chunk({"a": [1.0]})], {"a": RewardSection(role="monitor")})


def test_concatenate_keeps_order_and_fills_what_a_chunk_lacks():
    first = chunk({"a": [1, 2]}, details={"a/exact": np.array([1.0, 0.0])})
    scores = concatenate([first, chunk({"a": [NAN]}, failures={"a": BROKE}), chunk({"a": [3]})])
    np.testing.assert_array_equal(scores.values["a"], [1, 2, NAN, 3])
    np.testing.assert_array_equal(scores.details["a/exact"], [1, 0, NAN, NAN])
    assert scores.valid["a"].tolist() == [True, True, False, True]
    assert scores.failures == {"a": replace(BROKE, rows=(2,))} and scores.seconds == {"a": 1.5}


def test_scores_of_several_workers_stand_beside_each_other_in_the_order_of_the_run():
    broke = replace(BROKE, rows=(1,))
    late = chunk({"b": [3, NAN]}, failures={"b": broke}, details={"b/x": [1, 2]})
    first = chunk({"c": [5, 6], "a": [1, 2]}, details={"a/y": [7, 8]})
    for parts in ([late, first], [first, late]):
        scores = beside(parts, ["a", "b", "c"])
        assert list(scores.values) == list(scores.valid) == ["a", "b", "c"] and list(scores.details) == ["a/y", "b/x"]
        np.testing.assert_array_equal(scores.values["c"], [5, 6])
        np.testing.assert_array_equal(scores.valid["b"], [True, False])
        assert scores.failures == {"b": broke} and scores.seconds == dict.fromkeys("abc", 0.5)
