"""Credit for each denoising step over whole steps: real scores and settings, no workers."""

import json

import numpy as np
import pytest

from align_cluster.algorithms.gae import gae
from align_cluster.config.run import RunConfig
from align_cluster.loop.critic_advantages import CriticAdvantageEstimator, held_out
from align_cluster.loop.learning import CriticValues
from align_cluster.loop.rollouts import DrawnChunk
from align_cluster.prompts.groups import plan_step
from align_cluster.types import DrawInfo, Failure, Prompt, Scores

PROMPTS, SIZE, STEPS = 3, 2, 4
SAMPLES = PROMPTS * SIZE
SIGMAS = np.array([1.0, 0.7, 0.4, 0.1, 0.0])
WITHOUT = {"replay": {"images": 0}, "critic_held_out": 0}  # the critic learns from the step's own images, from all


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
            "algorithm": {"kind": "ppo", "warm_up": {"updates": updates}, "critic_epochs": 2, **WITHOUT} | algorithm,
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


def test_advantages_are_whitened_over_the_trained_steps_alone():
    estimator, (items, rewards), values = CriticAdvantageEstimator(settings()), drawn(settings()), said()
    credit = estimator.assign(items, CriticValues(values, SIGMAS, slots=(0, 2)))
    heads = [gae(values[..., r].astype(np.float64), normal(rewards)[r], 1.0, 0.95) for r in range(2)]
    total = ((3 * heads[0] - heads[1]) / 4)[:, [0, 2]]
    expected = np.clip((total - total.mean()) / total.std(), -5, 5).reshape(PROMPTS, SIZE, 2)
    np.testing.assert_allclose(credit.advantages[..., [0, 2]], expected, rtol=1e-5, atol=1e-6)
    assert not credit.advantages[..., [1, 3]].any()


def test_while_the_actor_waits_values_regress_on_the_rewards_themselves():
    config = settings(warm_up={"updates": 3, "explained_variance": 1.0})
    estimator, (items, rewards), values = CriticAdvantageEstimator(config), drawn(config), said()
    for step in range(3):
        credit = estimator.assign(items, CriticValues(values, SIGMAS))
        estimator.observe(items, {})
        assert credit.actor == (step == 2)  # 2 updates of the critic a step
        paid = np.repeat(normal(rewards).T[:, None], STEPS, 1).reshape(PROMPTS, SIZE, STEPS, 2)
        close = np.allclose(credit.returns, paid, rtol=1e-5, atol=1e-5)
        assert close == (step < 2)


def knowing(rewards: np.ndarray, heads: tuple[int, ...], levels: slice) -> np.ndarray:
    """Values [S, N, R] of heads that know their reward at some levels."""
    values = np.zeros((SAMPLES, STEPS, 2), np.float32)
    for head in heads:
        values[:, levels, head] = normal(rewards)[head][:, None]
    return values


def test_the_actor_begins_when_every_head_explains_enough_of_its_reward_at_low_noise():
    config = settings(warm_up={"updates": 1000, "explained_variance": 0.5, "steps": 1}, critic_held_out=0.9999)
    items, rewards = drawn(config)
    low = slice(2, 4)
    for heads, levels, warm in [((0, 1), low, True), ((0,), low, False), ((0, 1), slice(0, 2), False)]:
        found = CriticValues(knowing(rewards, heads, levels), SIGMAS)
        assert CriticAdvantageEstimator(config).assign(items, found).actor == warm


def test_what_the_critic_explains_is_taken_over_several_steps_and_held_out_prompts_alone():
    config = settings(warm_up={"updates": 1000, "explained_variance": 0.5, "steps": 2}, critic_held_out=0.9999)
    estimator, (items, rewards) = CriticAdvantageEstimator(config), drawn(config)
    knows, knows_not = (CriticValues(knowing(rewards, heads, slice(0, 4)), SIGMAS) for heads in ((0, 1), ()))
    first, second, third, fourth = (estimator.assign(items, found) for found in (knows, knows_not, knows, knows))
    assert [credit.actor for credit in (first, second, third, fourth)] == [False, False, False, True]
    assert "value/clip/held_out" not in first.metrics and fourth.metrics["value/clip/held_out"] == pytest.approx(1)
    assert 0.3 < second.metrics["value/clip/held_out"] < 0.6
    everybody = settings(warm_up={"updates": 1000, "explained_variance": 0.5, "steps": 1}, critic_held_out=0)
    assert not CriticAdvantageEstimator(everybody).assign(items, knows).actor  # no prompt is held out


def test_a_head_whose_reward_was_constant_is_not_ready():
    config = settings(warm_up={"updates": 1000, "explained_variance": 0.5, "steps": 1}, critic_held_out=0.9999)
    items, rewards = drawn(config)
    found = CriticValues(knowing(rewards, (0, 1), slice(0, 4)), SIGMAS)
    assert CriticAdvantageEstimator(config).assign(items, found).actor
    for item in items:
        item.scores.values["geneval"][:] = 0.5
    assert not CriticAdvantageEstimator(config).assign(items, found).actor


def test_a_share_of_the_prompts_is_held_out_whatever_the_run():
    texts = [f"a photo of {i}" for i in range(4000)]
    share = np.mean([held_out(text, 0.1) for text in texts])
    assert share == pytest.approx(0.1, abs=0.015)
    assert all(held_out(text, 0.3) for text in texts if held_out(text, 0.1)) and not any(
        held_out(text, 0) for text in texts
    )


def test_a_held_out_prompt_trains_the_actor_and_not_the_critic():
    texts = [f"prompt {i}" for i in range(5)]
    share = next(s / 100 for s in range(100) if 0 < sum(held_out(text, s / 100) for text in texts) < 5)
    config = settings(critic_held_out=share)
    items, _ = drawn(config)
    held = np.array([held_out(item.chunk.prompts[0].text, share) for item in items])
    credit = CriticAdvantageEstimator(config).assign(items, CriticValues(said(), SIGMAS))
    assert credit.valid.all() and credit.advantages.any((1, 2)).all()
    assert np.array_equal(np.isnan(credit.returns).all((1, 2, 3)), held)
    replaying = settings(critic_held_out=share, replay={"images": 100, "states": 1, "minibatch": 3})
    credit = CriticAdvantageEstimator(replaying).assign(items, kept(said()))
    names = {item.chunk.prompts[0].text for item, out in zip(items, held, strict=True) if not out}
    assert {text for batch in credit.replay for text in batch.texts} <= names and credit.returns is None


def kept(values: np.ndarray, seed: int = 4) -> CriticValues:
    """What a learner says of a step with one state kept of each image."""
    states = np.random.default_rng(seed).normal(size=(SAMPLES, 1, 2, 3, 3)).astype(np.float16)
    return CriticValues(values, SIGMAS, None, states, np.arange(SAMPLES)[:, None] % STEPS)


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
    config = settings(updates=3, replay={"images": 12, "states": 1, "minibatch": 4})
    one, values = CriticAdvantageEstimator(config), said()
    one.assign(drawn(config, 0)[0], kept(values))
    one.observe([], {})
    other = CriticAdvantageEstimator(config)
    other.restore(json.loads(json.dumps(one.state())), one.arrays())
    for estimator in (one, other):
        estimator.observe([], {})
    ours, theirs = (estimator.assign(drawn(config, 2)[0], kept(said(3), 5)) for estimator in (one, other))
    assert np.array_equal(ours.advantages, theirs.advantages) and len(ours.replay) == len(theirs.replay) == 3
    for a, b in zip(ours.replay, theirs.replay, strict=True):
        assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in vars(a))
    assert ours.metrics == theirs.metrics and ours.actor and theirs.actor
    assert [len(estimator.recent) for estimator in (one, other)] == [2, 2]
    assert all(np.array_equal(a, b) for a, b in zip(one.recent[0], other.recent[0], strict=True))


def test_without_noise_in_the_rewards_there_is_nothing_to_learn():
    config = settings(updates=1, critic_held_out=0.9999)
    items, _ = drawn(config)
    for item in items:
        item.scores.values["clip"][:] = item.scores.values["geneval"][:] = 0.5
    credit = CriticAdvantageEstimator(config).assign(
        items, CriticValues(np.zeros((SAMPLES, STEPS, 2), np.float32), SIGMAS)
    )
    assert not credit.advantages.any() and not np.nan_to_num(credit.returns).any()
    assert credit.metrics["value/actor"] == 0  # nothing explains what does not vary
