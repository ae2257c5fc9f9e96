import numpy as np
import pytest

from align_cluster.algorithms.gae import RunningMoments, explained_variance, gae, whiten

VALUES, REWARD = np.array([0.2, 0.3, 0.5]), np.array(1.0)


@pytest.mark.parametrize(
    ("decay", "expected"), [(1.0, [0.8, 0.7, 0.5]), (0.95, [0.74125, 0.675, 0.5]), (0.0, [0.1, 0.2, 0.5])]
)
def test_golden_advantages(decay, expected):
    np.testing.assert_allclose(gae(VALUES, REWARD, 1.0, decay), expected, atol=1e-12)


def test_every_reward_of_a_batch_is_credited_alone_and_equals_a_loop_over_all_pairs_of_steps():
    rng = np.random.default_rng(0)
    values, rewards, g, lam = rng.normal(size=(3, 2, 6)), rng.normal(size=(3, 2)), 0.97, 0.9
    found = gae(values, rewards, g, lam)
    for index in np.ndindex(3, 2):
        v = [*values[index], 0.0]
        deltas = [(rewards[index] if k == 5 else 0.0) + g * v[k + 1] - v[k] for k in range(6)]
        for k in range(6):
            assert found[index][k] == pytest.approx(sum((g * lam) ** (j - k) * deltas[j] for j in range(k, 6)))


def test_without_decay_the_advantages_telescope_to_the_reward_less_the_first_value():
    assert gae(VALUES, REWARD, 1.0, 0.0).sum() == pytest.approx(1 - 0.2)
    np.testing.assert_allclose(gae(VALUES, REWARD, 1.0, 1.0), 1 - VALUES)


def test_a_value_that_is_the_groups_mean_gives_grpos_advantage_without_deviation():
    rewards = np.array([[0.1, 0.4, 0.7], [1.0, 3.0, 2.0]])
    values = np.repeat(rewards.mean(1)[:, None, None], 3, 1).repeat(4, 2)
    expected = rewards - rewards.mean(1, keepdims=True)
    np.testing.assert_allclose(gae(values, rewards, 1.0, 1.0), np.repeat(expected[..., None], 4, -1), atol=1e-12)


def test_whitening_is_over_all_valid_steps_of_the_batch_and_masked_ones_get_nothing():
    advantages = np.random.default_rng(1).normal(2.0, 3.0, size=(5, 4, 3))
    valid = np.ones((5, 4, 3), dtype=bool)
    valid[0, 1] = False
    found = whiten(np.where(valid, advantages, 1e9), valid, clip=9.0)
    assert abs(found[valid].mean()) < 1e-12 and found[valid].std() == pytest.approx(1) and not found[~valid].any()
    assert np.abs(whiten(advantages, valid, clip=0.5)).max() == 0.5
    assert not whiten(np.full((2, 3), 7.0), np.ones((2, 3), bool), 5.0).any()
    assert not whiten(advantages, np.zeros_like(valid), 5.0).any()


def test_explained_variance():
    rewards = np.array([1.0, 2.0, 3.0, 6.0])
    assert explained_variance(rewards + 5, rewards) == pytest.approx(1)  # a constant error is no variance
    assert explained_variance(np.full(4, 3.0), rewards) == pytest.approx(0)
    assert explained_variance(-rewards, rewards) == pytest.approx(-3)
    assert np.isnan(explained_variance(rewards, np.ones(4)))


def test_running_moments_are_those_of_everything_seen_and_survive_a_checkpoint():
    rng, moments, seen = np.random.default_rng(2), RunningMoments(), []
    assert moments.normalise(np.array([3.0])) == 3.0
    for size in (1, 7, 0, 4, 100):
        part = rng.normal(1e3, 2.0, size)
        moments.observe(part)
        seen.extend(part)
        moments = RunningMoments.restored(moments.state())
    assert moments.mean == pytest.approx(np.mean(seen)) and moments.deviation == pytest.approx(np.std(seen))
    np.testing.assert_allclose(moments.normalise(np.array(seen)).std(), 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf, 1e300])
def test_one_number_that_cannot_be_computed_with_changes_nothing_for_the_others(broken):
    seen = np.array([1.0, 2.0, 4.0])
    moments, plain = RunningMoments(), RunningMoments()
    moments.observe(np.array([1.0, broken, 2.0, 4.0]))
    moments.observe(np.array([broken]))
    plain.observe(seen)
    assert moments.state() == plain.state()
    given, valid = np.array([[1.0, 2.0], [broken, 4.0], [9.0, 9.0]]), np.array([[True] * 2] * 2 + [[False] * 2])
    white, alone = whiten(given, valid, 5.0), whiten(seen, np.ones(3, bool), 5.0)
    np.testing.assert_array_equal(white, [[alone[0], alone[1]], [0, alone[2]], [0, 0]])


def test_an_update_of_nothing_but_nan_is_left_for_the_learner_to_skip_and_count():
    given = np.array([np.nan, np.inf, 1.0])
    assert np.isnan(whiten(given, np.array([True, True, False]), 5.0)).all()
    assert not whiten(given, np.zeros(3, bool), 5.0).any()
