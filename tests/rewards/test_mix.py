import numpy as np
import pytest

from align_cluster.rewards.base import RewardSection
from align_cluster.rewards.mix import concatenate, total
from align_cluster.types import Scores, UserError

NAN = float("nan")


def chunk(values, valid=None, failures=None, details=None):
    values = {name: np.array(column, dtype=np.float64) for name, column in values.items()}
    valid = valid or {name: np.isfinite(column) for name, column in values.items()}
    return Scores(values, valid, failures or {}, details or {}, seconds=0.5)


def test_total_is_the_weighted_sum_in_chunk_order():
    rewards = {"a": RewardSection(weight=2.0), "b": RewardSection(weight=-0.5)}
    sums, valid = total([chunk({"a": [1, 2], "b": [4, 0]}), chunk({"a": [3], "b": [2]})], rewards)
    np.testing.assert_array_equal(sums, [0, 4, 5])
    assert valid.all()


def test_monitors_never_count_not_even_when_they_fail():
    rewards = {"a": RewardSection(), "seen": RewardSection(weight=100.0, role="monitor")}
    broken = chunk({"a": [1, 2], "seen": [NAN, NAN]}, failures={"seen": "it broke"})
    sums, valid = total([chunk({"a": [1, 2], "seen": [7, 9]}), broken], rewards)
    np.testing.assert_array_equal(sums, [1, 2, 1, 2])
    assert valid.all()


def test_a_failed_reward_masks_its_images_and_no_others():
    rewards = {"a": RewardSection(), "b": RewardSection()}
    broken = chunk({"a": [1, 2], "b": [NAN, NAN]}, failures={"b": "it broke"})
    sums, valid = total([broken, chunk({"a": [1], "b": [2]})], rewards)
    assert valid.tolist() == [False, False, True]
    assert np.isnan(sums[:2]).all() and sums[2] == 3


def test_a_reward_that_does_not_apply_is_left_out():
    rewards = {"objects": RewardSection(), "text": RewardSection(weight=3.0)}
    sums, valid = total([chunk({"objects": [0.5], "text": [NAN]}), chunk({"objects": [NAN], "text": [1.0]})], rewards)
    np.testing.assert_array_equal(sums, [0.5, 3.0])
    assert valid.all()


def test_images_without_any_reward_are_masked_not_zero():
    sums, valid = total([chunk({"a": [NAN, 1.0]})], {"a": RewardSection()})
    assert valid.tolist() == [False, True] and np.isnan(sums[0])


def test_only_monitors_is_a_user_error():
    with pytest.raises(UserError, match="role: train"):
        total([chunk({"a": [1.0]})], {"a": RewardSection(role="monitor")})


def test_concatenate_keeps_order_and_fills_what_a_chunk_lacks():
    first = chunk({"a": [1, 2]}, details={"a/exact": np.array([1.0, 0.0])})
    table = concatenate([first, chunk({"a": [NAN]}, failures={"a": "it broke"}), chunk({"a": [3]})])
    np.testing.assert_array_equal(table.values["a"], [1, 2, NAN, 3])
    np.testing.assert_array_equal(table.details["a/exact"], [1, 0, NAN, NAN])
    assert table.valid["a"].tolist() == [True, True, False, True]
    assert table.failures == {"a": "it broke"} and table.seconds == 1.5
