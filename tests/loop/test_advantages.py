"""From scores to advantages over whole steps: real scores, chunks and settings, no workers."""

import numpy as np
import pytest

from align_cluster.algorithms.slas import largest_gamma
from align_cluster.algorithms.trust import bound
from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import Reduced, make_micro_batches
from align_cluster.loop.advantages import AdvantageEstimator
from align_cluster.loop.clock import Clock
from align_cluster.loop.rollouts import DrawnChunk
from align_cluster.loop.summary import step_metrics
from align_cluster.loop.syncing import Sync
from align_cluster.observe.metrics import describe
from align_cluster.prompts.groups import plan_step
from align_cluster.types import DrawInfo, Failure, Manifest, Prompt, Scores

PROMPTS, NOISES, CONDITIONS = 4, 3, 2
SIZE = NOISES * CONDITIONS
LENGTHS = {"lambda_max": 0.5, "score_norm": 2.0, "step_norm": 1e-3, "gradient_norm": 0.1}


def settings(chunk: int = SIZE, updates: int = 1, conditions: int = CONDITIONS, **advantage) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "credit",
            "seed": 3,
            "steps": 5,
            "prompts_per_step": PROMPTS,
            "backbone": {"kind": "sd3"},
            "prompts": {"kind": "embedded"},
            "rollout": {"group_size": SIZE // conditions, "chunk": chunk},
            "exploration": {"conditions": conditions},
            "rewards": {"clip": {"kind": "clip_score"}},
            "advantage": {"std": "global", **advantage},
            "algorithm": {"kind": "grpo"},
            "learner": {"updates_per_step": updates},
            "evaluate": {"prompts": {"kind": "embedded", "split": "held_out"}},
        }
    )


def drawn(
    config: RunConfig, step: int = 2, failing: tuple[tuple[int, int], ...] = ()
) -> tuple[list[DrawnChunk], np.ndarray]:
    """A step's scored chunks, and its rewards [P, M]; `failing` (group, member) have no score."""
    rng = np.random.default_rng(step)
    rewards = rng.standard_t(4, (PROMPTS, SIZE)) + 3 * rng.standard_normal((PROMPTS, 1))
    prompts = [Prompt(i, f"prompt {i}") for i in range(9)]
    rollout = config.rollout
    chunks = plan_step(
        prompts, config.seed, step, PROMPTS, rollout.group_size, rollout.chunk, config.conditions, rollout.same_noise
    )
    items = []
    for chunk in chunks:
        ok = np.array([(row.group, row.member) not in failing for row in chunk.rows])
        own = np.array([rewards[row.group, row.member] for row in chunk.rows])
        failure = Failure("model_error", "it broke", tuple(np.flatnonzero(~ok).tolist()))
        scores = Scores({"clip": own}, {"clip": ok}, {} if ok.all() else {"clip": failure})
        items.append(DrawnChunk(DrawInfo(chunk, 1, "", 0.0), None, None, scores, None))
    return items, rewards


def measured(step_kl: float = 1e-4) -> dict[str, Reduced]:
    """Learner metrics as they are merged over ranks, (mean, largest magnitude)."""
    lengths = {name: Reduced(value / 3, value) for name, value in LENGTHS.items()}
    return lengths | {"step_kl": Reduced(step_kl, 3 * step_kl), "loss": Reduced(0.1, 0.2)}


@pytest.mark.parametrize("chunk", [1, 2, SIZE, 7, 4 * SIZE])
def test_advantages_of_a_group_sum_to_zero_over_all_noises_and_conditions(chunk):
    config = settings(chunk)
    items, rewards = drawn(config)
    credit = AdvantageEstimator(config).assign(items)
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std() + 1e-4)
    np.testing.assert_allclose(credit.advantages, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(credit.advantages.sum(1), 0, atol=1e-5)
    assert credit.valid.all() and (np.abs(credit.advantages.reshape(PROMPTS, CONDITIONS, -1).sum(2)) > 1e-2).any()


def test_a_group_with_a_failed_score_still_sums_to_zero_over_the_rest():
    config = settings(2)
    items, _ = drawn(config, failing=((1, 4), (3, 0)))
    credit = AdvantageEstimator(config).assign(items)
    assert [tuple(place) for place in np.argwhere(~credit.valid)] == [(1, 4), (3, 0)]
    assert (credit.advantages[~credit.valid] == 0).all()
    np.testing.assert_allclose(credit.advantages.sum(1), 0, atol=1e-5)


def test_metrics_split_a_group_into_noises_and_conditions():
    config = settings(2)
    items, rewards = drawn(config)
    metrics = AdvantageEstimator(config).assign(items).metrics
    grid = rewards.reshape(PROMPTS, CONDITIONS, NOISES)  # condition by condition
    assert metrics["group/std_across_noises"] == pytest.approx(grid.std(2).mean())
    assert metrics["group/std_across_conditions"] == pytest.approx(grid.std(1).mean())
    assert metrics["group/original_mean"] == pytest.approx(grid[:, 0].mean())
    assert metrics["group/perturbed_mean"] == pytest.approx(grid[:, 1:].mean())
    plain = settings(2, conditions=1)
    assert not any(
        "conditions" in name or "perturbed" in name for name in AdvantageEstimator(plain).assign(items).metrics
    )


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize(("chunk", "updates"), [(SIZE, 1), (SIZE, 2), (20, 4), (SIZE, 3), (3, 2), (24, 2)])
def test_an_update_has_the_samples_that_the_learner_trains_in_it(chunk, updates, step):
    config = settings(chunk, updates, std="update")
    items, rewards = drawn(config, step)
    chunks = [item.info.chunk for item in items]
    numbers = [np.arange(len(chunk), dtype=np.float32) for chunk in chunks]
    pieces = make_micro_batches(numbers, [n >= 0 for n in numbers], bounds=config.update_bounds, size=2)
    update = np.full((PROMPTS, SIZE), -1)
    for piece in pieces:
        for row in chunks[piece.source].rows[piece.rows]:
            update[row.group, row.member] = piece.update
    assert set(update.ravel()) == set(range(updates))
    expected = rewards - rewards.mean(1, keepdims=True)
    for number in range(updates):
        expected[update == number] /= rewards[update == number].std() + 1e-4
    np.testing.assert_allclose(AdvantageEstimator(config).assign(items).advantages, expected, rtol=1e-5, atol=1e-6)


def test_without_an_adaptive_gamma_there_is_nothing_to_observe():
    for shaping in ({}, {"shaping": {"gamma": 0.5}}):
        estimator = AdvantageEstimator(settings(**shaping))
        items, _ = drawn(estimator.config)
        before = estimator.assign(items)
        assert estimator.observe(items, measured()) == {}
        np.testing.assert_array_equal(estimator.assign(items).advantages, before.advantages)
    assert before.metrics["advantage/gamma"] == 0.5


@pytest.mark.parametrize("updates", [1, 2])
def test_an_adaptive_gamma_is_the_largest_that_keeps_every_updates_tail(updates):
    config = settings(updates=updates, shaping={"gamma": "adaptive", "tail": 1.8, "gamma_max": 5.0})
    items, _ = drawn(config)
    linear = AdvantageEstimator(settings()).assign(items).advantages.astype(np.float64)
    found = AdvantageEstimator(config).assign(items)
    gamma = found.metrics["advantage/gamma"]

    def moments(exponent: float) -> list[float]:
        shares = (linear**2).reshape(updates, -1)
        return [float(np.mean((share / share.mean()) ** (1 + exponent))) for share in shares]

    assert 0.05 < gamma < 5 and max(moments(gamma)) <= 1.8 * (1 + 1e-5) < max(moments(gamma + 0.01))
    assert found.metrics["advantage/moment"] == pytest.approx(max(moments(gamma)), rel=1e-4)
    shaped = np.sign(linear) * np.abs(linear) ** (1 + gamma)
    np.testing.assert_allclose(found.advantages, shaped, rtol=1e-4, atol=1e-6)
    assert AdvantageEstimator(config).state() == {} and AdvantageEstimator(config).observe(items, measured()) == {}


WORST = {"gamma": "adaptive", "bound": "worst_case", "delta": 2e-4, "gamma_max": 5.0}


def test_the_worst_case_bound_is_what_the_last_update_allows_and_shapes_the_next_step():
    config = settings(shaping=WORST)
    estimator, plain = AdvantageEstimator(config), AdvantageEstimator(settings())
    items, _ = drawn(config)
    linear = plain.assign(items).advantages
    first = estimator.assign(items)
    np.testing.assert_array_equal(first.advantages, linear)  # nothing is known yet: as without shaping
    assert first.metrics["advantage/gamma"] == 0

    logged, limit = estimator.observe(items, measured()), bound(delta=2e-4, **LENGTHS)
    gamma = largest_gamma(linear.astype(np.float64), limit, 5.0)
    assert 0.1 < gamma < 5 and logged["slas/gamma"] == pytest.approx(gamma, abs=1e-4)
    assert logged["slas/bound"] == pytest.approx(limit)

    items, _ = drawn(config, step=3)
    second, linear = estimator.assign(items), plain.assign(items).advantages
    np.testing.assert_allclose(
        second.advantages, np.sign(linear) * np.abs(linear) ** (1 + logged["slas/gamma"]), rtol=1e-4, atol=1e-6
    )
    assert second.metrics["advantage/gamma"] == logged["slas/gamma"]
    assert np.abs(second.advantages.sum(1)).max() > 1e-2 and second.metrics["advantage/sum"] > 1e-2


def test_an_update_that_was_not_measured_leaves_gamma_and_a_dangerous_one_lowers_it():
    estimator = AdvantageEstimator(settings(shaping=WORST))
    items, _ = drawn(estimator.config)
    before = estimator.observe(items, measured())["slas/gamma"]
    assert before > 0 and estimator.observe(items, {"loss": (0.1, 0.2)}) == {}
    assert estimator.assign(items).metrics["advantage/gamma"] == before
    long = measured() | {"step_norm": Reduced(0.1, 0.1)}  # a step so long that it allows no shaping at all
    estimator.observe(items, long)
    assert estimator.assign(items).metrics["advantage/gamma"] == pytest.approx(before * 0.9 / (0.9 + 1))
    resumed = AdvantageEstimator(settings(shaping=WORST))
    resumed.restore(estimator.state(), {})
    np.testing.assert_array_equal(resumed.assign(items).advantages, estimator.assign(items).advantages)


def test_samples_without_a_score_do_not_count_in_the_trust_region():
    config = settings(shaping=WORST)
    failing = ((0, 0), (2, 5))
    items, _ = drawn(config, failing=failing)
    estimator = AdvantageEstimator(config)
    logged = estimator.observe(items, measured())
    credit = AdvantageEstimator(settings()).assign(items)
    u = credit.advantages[credit.valid].astype(np.float64)
    assert len(u) == PROMPTS * SIZE - 2
    moment = np.mean((u**2 / np.mean(u**2)) ** (1 + logged["slas/gamma"]))
    assert logged["slas/moment"] == pytest.approx(moment, rel=1e-4)


@pytest.mark.parametrize("chunk", [2, SIZE, 7])
def test_a_step_tells_how_each_reward_spreads_inside_a_group_without_failed_scores(chunk):
    config = settings(chunk)
    items, rewards = drawn(config, failing=((1, 4), (3, 0)))
    sync = Sync(Manifest(1, (), 0, ""), None, 0.0)
    row = step_metrics(config, items, AdvantageEstimator(config).assign(items), {}, Clock(), sync)
    groups = [np.delete(group, failed) for group, failed in zip(rewards, ([], [4], [], [0]), strict=True)]
    assert row["reward/clip/spread"] == pytest.approx(np.mean([group.std() for group in groups]))
    assert row["reward/clip/spread"] < row["reward/clip/std"]  # which holds the differences between prompts as well
    assert describe("reward/clip/spread").unit == "score" and "inside a group" in describe("reward/clip/spread").meaning
