import numpy as np
import pytest

from align_cluster.algorithms.advantage import AdvantageConfig, advantages, credit, live_groups

EPS = 1e-4


def example(seed: int = 0, groups: int = 5, members: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rewards = rng.uniform(size=(groups, 1)) + 0.3 * rng.standard_normal((groups, members))
    return rewards, np.ones(rewards.shape, dtype=bool)


def by_hand(rewards, valid, std, eps):
    """The definitions of the two kinds, one number at a time."""
    result = np.zeros(rewards.shape)
    everything = [rewards[p, g] for p in range(len(rewards)) for g in range(rewards.shape[1]) if valid[p, g]]
    for p in range(len(rewards)):
        group = [rewards[p, g] for g in range(rewards.shape[1]) if valid[p, g]]
        if len(group) < 2 or max(group) - min(group) <= 1e-6:
            continue
        mean = sum(group) / len(group)
        pool = group if std == "group" else everything
        centre = sum(pool) / len(pool)
        deviation = (sum((r - centre) ** 2 for r in pool) / len(pool)) ** 0.5
        for g in range(rewards.shape[1]):
            if valid[p, g]:
                result[p, g] = (rewards[p, g] - mean) / (deviation + eps)
    return result


def test_the_deviation_of_all_rewards_is_of_raw_ones():
    rewards = np.array([[0.2, 0.4, 0.5, 0.9], [0.1, 0.1, 0.1, 0.1]])
    a = advantages(rewards, np.ones_like(rewards, bool), "global", 1e-8)
    np.testing.assert_allclose(a, [[-1.114172, -0.371391, 0, 1.485563], [0, 0, 0, 0]], atol=1e-6)


def test_the_deviation_of_a_group_is_its_own():
    rewards = np.array([[0.0, 1.0], [0.0, 100.0]])
    a = advantages(rewards, np.ones_like(rewards, bool), "group", 1e-12)
    np.testing.assert_allclose(a, [[-1, 1], [-1, 1]], atol=1e-9)


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("masked", [0.0, 0.3, 0.8])
def test_advantages_are_those_computed_one_by_one(std, masked):
    for seed in range(5):
        rewards, _ = example(seed)
        valid = np.random.default_rng(seed).uniform(size=rewards.shape) >= masked
        rewards[1] = 0.4
        expected = by_hand(rewards, valid, std, EPS)
        np.testing.assert_allclose(advantages(rewards, valid, std, EPS), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("std", ["group", "global"])
def test_advantages_of_a_group_sum_to_zero(std):
    rewards, valid = example()
    valid[0, 2] = valid[3, :4] = False
    np.testing.assert_allclose(advantages(rewards, valid, std, EPS).sum(1), 0, atol=1e-12)


def test_a_constant_added_to_a_prompts_rewards_changes_nothing():
    rewards, valid = example()
    shift = np.arange(5.0)[:, None]
    np.testing.assert_allclose(
        advantages(rewards + shift, valid, "group", EPS), advantages(rewards, valid, "group", EPS), atol=1e-9
    )
    np.testing.assert_allclose(
        advantages(rewards + 7, valid, "global", EPS), advantages(rewards, valid, "global", EPS), atol=1e-9
    )


@pytest.mark.parametrize("std", ["group", "global"])
def test_the_scale_of_rewards_changes_nothing_when_eps_vanishes(std):
    rewards, valid = example()
    first, second = (advantages(scale * rewards, valid, std, 1e-15) for scale in (1.0, 37.0))
    np.testing.assert_allclose(first, second, rtol=1e-9)


@pytest.mark.parametrize("std", ["group", "global"])
def test_the_order_of_groups_and_members_changes_nothing(std):
    rewards, valid = example()
    valid[2, 1] = False
    rng = np.random.default_rng(9)
    rows, columns = rng.permutation(5), rng.permutation(6)
    moved = advantages(rewards[rows][:, columns], valid[rows][:, columns], std, EPS)
    np.testing.assert_allclose(moved, advantages(rewards, valid, std, EPS)[rows][:, columns], atol=1e-12)


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("noise", [0.0, 1e-16, 3e-7])
def test_a_flat_group_gets_exactly_zero(std, noise):
    rewards, valid = example()
    rewards[2] = 1 / 3 + noise * np.arange(6) / 6
    a = advantages(rewards, valid, std, 1e-12)
    assert (a[2] == 0).all() and np.isfinite(a).all() and (a[[0, 1, 3, 4]] != 0).all()


@pytest.mark.parametrize("std", ["group", "global"])
def test_masked_rewards_count_nowhere_and_get_zero(std):
    rewards, valid = example()
    valid[0, 1] = valid[4, 0] = False
    spoiled = np.where(valid, rewards, np.nan)
    spoiled[4, 0] = 1e12
    a = advantages(spoiled, valid, std, EPS)
    np.testing.assert_array_equal(a, advantages(rewards, valid, std, EPS))
    assert (a[~valid] == 0).all() and np.isfinite(a).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("std", ["group", "global"])
def test_groups_with_fewer_than_two_valid_rewards_and_steps_without_any_are_zero(std):
    rewards, valid = example()
    valid[1], valid[2] = False, np.arange(6) == 3
    a = advantages(rewards, valid, std, EPS)
    assert (a[1:3] == 0).all() and (a[0] != 0).all()
    np.testing.assert_array_equal(live_groups(rewards, valid), [True, False, False, True, True])
    assert (advantages(rewards, np.zeros_like(valid), std, EPS) == 0).all()
    nothing = credit(np.full((2, 3), np.nan), np.zeros((2, 3), bool), AdvantageConfig(std=std))
    assert (nothing.advantages == 0).all() and nothing.metrics["group/masked"] == 1


def test_credit_reports_the_spread_of_groups_and_the_share_that_teaches_nothing():
    rewards = np.array([[0.0, 1.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    valid = np.ones_like(rewards, bool)
    learned = credit(rewards, valid, AdvantageConfig(std="group"))
    assert learned.advantages.dtype == np.float32 and learned.advantages.shape == (2, 4)
    assert learned.metrics == {"group/std": 0.25, "group/zero_std_ratio": 0.5, "group/masked": 0.0}
    valid[0, :2] = False
    masked = credit(rewards, valid, AdvantageConfig(std="group"))
    np.testing.assert_allclose(masked.advantages[0], [0, 0, -1, 1], atol=1e-3)
    assert masked.metrics == {"group/std": 0.25, "group/zero_std_ratio": 0.5, "group/masked": 0.25}
