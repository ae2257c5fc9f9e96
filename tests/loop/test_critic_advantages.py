"""Credit for each denoising step over whole steps: real scores and settings, no workers."""

import json

import numpy as np
import pytest

from align_cluster.algorithms.gae import gae
from align_cluster.config.run import RunConfig
from align_cluster.loop.critic_advantages import CriticAdvantageEstimator
from align_cluster.loop.learning import CriticValues
from align_cluster.loop.rollouts import DrawnChunk
from align_cluster.prompts.groups import plan_step
from align_cluster.types import DrawInfo, Failure, Prompt, Scores

PROMPTS, SIZE, STEPS = 3, 2, 4
SAMPLES = PROMPTS * SIZE
SIGMAS = np.array([1.0, 0.7, 0.4, 0.1, 0.0])


def settings(updates: int = 0, **algorithm) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "credit",
            "steps": 5,
            "prompts_per_step": PROMPTS,
            "backbone": {"kind": "sd3"},
            "prompts": {"kind": "embedded"},
            "rollout": {"group_size": SIZE, "steps": STEPS},
            "rewards": {"clip": {"kind": "clip_score", "weight": 3}, "geneval": {"kind": "geneval", "weight": -1}},
            "algorithm": {"kind": "ppo", "warm_up": {"updates": updates}} | algorithm,
            "learner": {"updates_per_step": 2},
            "evaluate": {"prompts": {"kind": "embedded", "split": "held_out"}},
        }
    )


def drawn(config: RunConfig, seed: int = 0, failing: int | None = None) -> tuple[list[DrawnChunk], np.ndarray]:
    """A step's scored chunks, and rewards [2, S]; sample number `failing` has no GenEval score."""
    rewards = np.random.default_rng(seed).normal(size=(2, SAMPLES))
    prompts = [Prompt(i, f"prompt {i}") for i in range(5)]
    items = []
    for number, chunk in enumerate(plan_step(prompts, 0, 0, PROMPTS, SIZE, SIZE, 1, False)):
        rows = slice(number * SIZE, (number + 1) * SIZE)
        valid = {"clip": np.ones(SIZE, bool), "geneval": np.arange(rows.start, rows.stop) != failing}
        scores = Scores({"clip": rewards[0, rows], "geneval": rewards[1, rows]}, valid, {})
        items.append(DrawnChunk(DrawInfo(chunk, 1, "", 0.0), None, None, scores, None))
    return items, rewards


def said(seed: int = 1) -> np.ndarray:
    """Values [S, N, R]."""
    return np.random.default_rng(seed).normal(size=(SAMPLES, STEPS, 2)).astype(np.float32)


def normal(rewards: np.ndarray) -> np.ndarray:
    return (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)


def test_a_steps_advantages_are_whitened_weighted_means_of_each_heads_gae():
    estimator, (items, rewards), values = CriticAdvantageEstimator(settings()), drawn(settings()), said()
    credit = estimator.assign(items, CriticValues(values, SIGMAS))
    heads = [gae(values[..., r].astype(np.float64), normal(rewards)[r], 1.0, 0.95) for r in range(2)]
    total = (3 * heads[0] - heads[1]) / 4
    expected = np.clip((total - total.mean()) / total.std(), -5, 5).reshape(PROMPTS, SIZE, STEPS)
    np.testing.assert_allclose(credit.advantages, expected, rtol=1e-5, atol=1e-6)
    returns = np.stack(heads, -1) + values
    np.testing.assert_allclose(credit.returns, returns.reshape(PROMPTS, SIZE, STEPS, 2), rtol=1e-5, atol=1e-6)
    assert credit.actor and credit.valid.all()


def test_while_the_actor_waits_values_regress_on_the_rewards_themselves():
    config = settings(warm_up={"updates": 3, "explained_variance": 1.0})
    estimator, (items, rewards), values = CriticAdvantageEstimator(config), drawn(config), said()
    for step in range(3):
        credit = estimator.assign(items, CriticValues(values, SIGMAS))
        estimator.observe(items, {})
        assert credit.actor == (step == 2)  # 2 updates a step
        paid = np.repeat(normal(rewards).T[:, None], STEPS, 1).reshape(PROMPTS, SIZE, STEPS, 2)
        close = np.allclose(credit.returns, paid, rtol=1e-5, atol=1e-5)
        assert close == (step < 2)


def test_the_actor_begins_when_every_head_explains_enough_of_its_reward_at_low_noise():
    config = settings(warm_up={"updates": 1000, "explained_variance": 0.5})
    items, rewards = drawn(config)
    knows = np.repeat(normal(rewards).T[:, None], STEPS, 1)
    for r, levels, warm in [((0, 1), slice(2, 4), True), ((0,), slice(2, 4), False), ((0, 1), slice(0, 2), False)]:
        values = np.zeros((SAMPLES, STEPS, 2), np.float32)
        for head in r:
            values[:, levels, head] = knows[:, levels, head]
        assert CriticAdvantageEstimator(config).assign(items, CriticValues(values, SIGMAS)).actor == warm


def test_a_reward_that_failed_costs_its_image_and_nothing_else():
    config, values = settings(), said()
    items, _ = drawn(config, failing=1)
    items[0].scores.failures["geneval"] = Failure("model_error", "it broke", (1,))
    estimator = CriticAdvantageEstimator(config)
    credit = estimator.assign(items, CriticValues(values, SIGMAS))
    assert credit.valid.tolist() == [[True, False], [True, True], [True, True]]
    assert not credit.advantages[0, 1].any() and np.isnan(credit.returns[0, 1]).all()
    assert credit.advantages[credit.valid].std() == pytest.approx(1, rel=1e-5)
    assert np.isfinite(credit.returns[credit.valid]).all()
    assert estimator.moments["geneval"].count == estimator.moments["clip"].count == SAMPLES - 1


def test_a_restored_creditor_goes_on_as_if_nothing_had_happened():
    config = settings(updates=3)
    one, values = CriticAdvantageEstimator(config), said()
    one.assign(drawn(config, 0)[0], CriticValues(values, SIGMAS))
    one.observe([], {})
    other = CriticAdvantageEstimator(config)
    other.restore(json.loads(json.dumps(one.state())), one.arrays())
    for estimator in (one, other):
        estimator.observe([], {})
    ours, theirs = (estimator.assign(drawn(config, 2)[0], CriticValues(said(3), SIGMAS)) for estimator in (one, other))
    assert np.array_equal(ours.advantages, theirs.advantages) and np.array_equal(ours.returns, theirs.returns)
    assert ours.metrics == theirs.metrics and ours.actor and theirs.actor
    assert [len(estimator.recent) for estimator in (one, other)] == [2, 2]
    assert all(np.array_equal(a, b) for a, b in zip(one.recent[0], other.recent[0], strict=True))


def test_without_noise_in_the_rewards_there_is_nothing_to_learn():
    config = settings(updates=1)
    items, _ = drawn(config)
    for item in items:
        item.scores.values["clip"][:] = item.scores.values["geneval"][:] = 0.5
    credit = CriticAdvantageEstimator(config).assign(
        items, CriticValues(np.zeros((SAMPLES, STEPS, 2), np.float32), SIGMAS)
    )
    assert not credit.advantages.any() and not credit.returns.any()
    assert credit.metrics["value/actor"] == 0  # nothing explains what does not vary
