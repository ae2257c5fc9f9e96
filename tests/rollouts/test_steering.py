"""Steering: the formulas, the modes on toy fields, and guidance on the tiny real networks."""

import math
import re
from itertools import product

import numpy as np
import pytest
import torch

from align_cluster.backbones.adapters import add_adapters
from align_cluster.backbones.base import CriticSection
from align_cluster.backbones.critic import Critic
from align_cluster.backbones.levels import ddim_levels, sd3_sigmas
from align_cluster.errors import UserError
from align_cluster.rollouts.denoise import denoise
from align_cluster.rollouts.guidance import TextBatch
from align_cluster.rollouts.steering import (
    STEERING,
    clipped,
    effective_size,
    guidance_gains,
    normalised,
    systematic,
    weighted,
)
from align_cluster.rollouts.steps import STEPS, Dpm2

from ..backbones.contract import TEXT, Case
from ..backbones.test_critic import shake

SHAPE, SEEDS = (4, 3, 5), (1, 7, 3, 9)
KINDS = [(kind, p) for kind, step in STEPS.items() if step is not Dpm2 for p in step.predictions]
CENTRE = torch.linspace(-1, 1, math.prod(SHAPE)).reshape(SHAPE)


def velocity(x, sigma):
    return torch.tanh(3 * x) - 0.3 * x.roll(1, dims=1) + sigma.view(-1, 1, 1, 1)


def quadratic(x, sigma):
    """Two heads, of which the second does not count: V = -|x - centre|^2 / 2."""
    return torch.stack([-0.5 * ((x - CENTRE.to(x)) ** 2).flatten(1).sum(1), sigma], 1)


def make_step(kind, prediction="flow", steps=8):
    sigmas = sd3_sigmas(steps, 3.0) if prediction == "flow" else ddim_levels(steps)
    return STEPS[kind](STEPS[kind].Config(), sigmas, prediction)


def make(mode, step, values=quadratic, seeds=SEEDS, shares=(1.0, 0.0), **settings):
    config = STEERING[mode].Config(**settings)
    return STEERING[mode](config, step=step, value_function=values, shares=np.array(shares), seeds=seeds)


def said(*rows):
    """A critic with one head whose n-th answer is the n-th of `rows`."""
    answers = iter(rows)
    return lambda x, sigma: torch.tensor(next(answers), dtype=torch.float64)[:, None]


def test_weights_are_a_softmax_whatever_their_size_and_worth_one_to_n_particles():
    np.testing.assert_allclose(normalised(np.log([1.0, 3.0]) + 1e4), [0.25, 0.75])
    assert effective_size(np.full(4, 0.25)) == 4 and effective_size(np.array([0, 1.0, 0])) == 1
    assert effective_size(np.array([0.5, 0.25, 0.25])) == pytest.approx(1 / 0.375)


def test_systematic_resampling_gives_each_particle_its_share_rounded_down_or_up_and_exactly_on_average():
    weights, offsets = np.array([0.05, 0.41, 0.0, 0.3, 0.24]), (np.arange(4000) + 0.5) / 4000
    counts = np.array([np.bincount(systematic(weights, offset), minlength=5) for offset in offsets])
    expected = 5 * weights
    assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
    np.testing.assert_allclose(counts.mean(0), expected, atol=1e-3)
    assert (counts.sum(1) == 5).all() and not counts[:, 2].any()


def test_a_mean_of_heads_leaves_out_what_is_not_known_and_keeps_the_signs_of_the_weights():
    heads = np.array([[1.0, 2.0], [np.nan, 2.0], [1.0, np.nan], [np.nan, np.nan]])
    np.testing.assert_allclose(weighted(heads, np.array([0.75, -0.25])), [0.25, -2.0, 1.0, np.nan])


def test_guidance_of_scale_zero_is_plain_sampling_bit_for_bit():
    for (kind, prediction), mode in product(KINDS, ("guidance", "guided_best_of_n")):
        step = make_step(kind, prediction)
        steering = make(mode, step, scale=0.0)
        steered = denoise(velocity, step, SHAPE, SEEDS, steer=steering)
        assert torch.equal(steered.x0, denoise(velocity, step, SHAPE, SEEDS).x0) and steering.backwards > 0


def test_the_gradient_is_that_of_finite_differences_also_of_more_latents_than_a_batch():
    x = torch.randn(11, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steering = make("guidance", make_step("euler"), shares=(-0.5, 0.5))
    gradient = steering.gradient(3, x)
    torch.testing.assert_close(gradient, 0.5 * (x - CENTRE))
    nudge = torch.zeros(SHAPE, dtype=torch.float64)
    nudge[1, 2, 3] = 1e-4
    up, down = (-0.5 * quadratic(x + sign * nudge, x.new_zeros(11))[:, 0] for sign in (1, -1))
    torch.testing.assert_close(gradient[:, 1, 2, 3], (up - down) / 2e-4, rtol=1e-6, atol=1e-6)
    assert (steering.forwards, steering.backwards) == (11, 11) and not x.requires_grad
    np.testing.assert_allclose(steering.values, quadratic(x, x.new_full((11,), float(steering.step.sigmas[3]))))


def test_guidance_moves_the_mean_of_a_noisy_step_by_its_variance_times_the_gradient():
    scale, x = 0.5, torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for kind, prediction in (pair for pair in KINDS if STEPS[pair[0]].has_density):
        step = make_step(kind, prediction)
        steering = make("guidance", step, scale=scale, clip=1e6, low=0.0, high=1.0)
        for k in range(7):
            v, at = velocity(x, torch.ones(2)), torch.full((2,), k)
            mean, std, _ = step.mean(at, x, v)
            pushed, _, _ = step.mean(at, x, steering.push(k, x, v))
            wanted = mean - scale * std.view(-1, 1, 1, 1) ** 2 * (x - CENTRE)
            torch.testing.assert_close(pushed, wanted, rtol=1e-4, atol=1e-5)


def test_guidance_adds_the_gradient_to_the_score_of_a_step_without_noise():
    scale, x = 0.5, torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    noise = {  # what an output at noise level s says of the noise in x; the score is -noise / sigma
        "flow": lambda output, s: x + (1 - s) * output,
        "epsilon": lambda output, s: output,
        "v": lambda output, s: s * x + math.sqrt(1 - s**2) * output,
    }
    for prediction, noise_of in noise.items():
        step = make_step("euler", prediction)
        steering = make("guidance", step, scale=scale, clip=1e6)
        for k in np.flatnonzero((step.sigmas[:-1] >= 0.2) & (step.sigmas[:-1] <= 0.95)):
            sigma, v = float(step.sigmas[k]), velocity(x, torch.ones(2))
            pushed = steering.push(k, x, v)
            gained = (noise_of(v, sigma) - noise_of(pushed, sigma)) / sigma
            torch.testing.assert_close(gained, -scale * (x - CENTRE), rtol=1e-3, atol=1e-4)
            if prediction == "flow":
                torch.testing.assert_close(pushed, v + scale * sigma / (1 - sigma) * (x - CENTRE), rtol=1e-4, atol=1e-5)


def test_where_almost_all_is_noise_the_odes_guidance_is_bounded_and_a_last_step_without_noise_is_the_odes():
    assert guidance_gains(make_step("euler"))[0] == pytest.approx(-20)
    dance, euler = make_step("dance_sde"), make_step("euler")
    assert guidance_gains(dance)[-1] == guidance_gains(euler)[-1] != 0
    assert guidance_gains(dance)[3] != guidance_gains(euler)[3]


def test_a_gradient_is_clipped_to_a_share_of_each_samples_own_output():
    output = torch.stack([torch.full(SHAPE, 1.0), torch.full(SHAPE, 10.0), torch.ones(SHAPE)])
    gradient = torch.stack([torch.full(SHAPE, 0.5), torch.full(SHAPE, 0.5), torch.zeros(SHAPE)])
    found = clipped(gradient, output, 0.1)
    torch.testing.assert_close(found[0], torch.full(SHAPE, 0.1))
    assert torch.equal(found[1:], gradient[1:])


def test_no_push_is_longer_than_its_share_of_the_output_and_a_short_one_is_as_it_is():
    """At noise level 8/9 the ODE's gain is -8: what was bounded was the gradient, and the push 3.2 times the output."""
    x, v, sigmas = torch.zeros(1, *SHAPE), torch.full((1, *SHAPE), 3.0), np.array([1, 8 / 9, 0.5, 0])

    def pushed(slope, step):
        steering = make("guidance", step, lambda x, sigma: slope * x.flatten(1).sum(1, keepdim=True), shares=(1.0,))
        return steering.push(1, x, v)

    euler = STEPS["euler"](STEPS["euler"].Config(), sigmas, "flow")
    torch.testing.assert_close(pushed(0.005, euler), torch.full_like(v, 3 - 4 * 8 * 0.005))
    torch.testing.assert_close(pushed(0.01, euler), torch.full_like(v, 3 - 0.1 * 3))  # 4 x 8 x .01 is above .3
    torch.testing.assert_close(pushed(-50.0, euler), torch.full_like(v, 3 + 0.1 * 3))


def test_the_bound_holds_for_every_kind_of_step_at_every_level_and_keeps_the_direction():
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    for (kind, prediction), scale in product(KINDS, (0.01, 4.0, 1e4)):
        step = make_step(kind, prediction)
        steering = make("guidance", step, scale=scale, clip=0.3, low=0.0, high=1.0)
        free = make("guidance", step, scale=scale, clip=1e9, low=0.0, high=1.0)
        for k in range(8):
            v = velocity(x, torch.ones(3))
            push, whole = ((one.push(k, x, v) - v).flatten(1).double() for one in (steering, free))
            most = 0.3 * v.flatten(1).norm(dim=1).double()
            assert (push.norm(dim=1) <= most * (1 + 1e-4)).all()
            wanted = whole * (most / whole.norm(dim=1)).clamp(max=1)[:, None]
            torch.testing.assert_close(push, wanted, rtol=1e-3, atol=1e-5)


def test_a_gradient_that_is_not_finite_pushes_nothing_and_is_counted():
    def values(x, sigma):
        broken = torch.tensor([1.0, math.nan, math.inf, 1.0]).view(-1, 1)
        return broken * x.flatten(1).sum(1, keepdim=True)

    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    steering, v = make("guidance", make_step("euler"), values, shares=(1.0,)), velocity(x, torch.ones(4))
    pushed = steering.push(3, x, v)
    assert torch.equal(pushed[1:3], v[1:3]) and not torch.equal(pushed[::3], v[::3])
    assert steering.facts() == {"not_finite": 2}


def test_only_noise_levels_within_bounds_are_guided_and_paid_for():
    step = make_step("flow_sde")
    steering = make("guidance", step, low=0.4, high=0.9)
    inside = int(((step.sigmas[:-1] >= 0.4) & (step.sigmas[:-1] <= 0.9)).sum())
    denoise(velocity, step, SHAPE, SEEDS, steer=steering)
    assert 0 < inside < 8 and steering.forwards == steering.backwards == inside * len(SEEDS)


def test_equal_values_keep_weights_uniform_and_never_resample():
    step = make_step("flow_sde")
    steering = make("smc", step, lambda x, sigma: torch.stack([7 - sigma, sigma], 1), resample_below=0.999)
    steered = denoise(velocity, step, SHAPE, SEEDS, steer=steering)
    assert torch.equal(steered.x0, denoise(velocity, step, SHAPE, SEEDS).x0)
    assert steering.choose(np.array([[0.0, 5], [1, 0], [3, 0], [2, 0]])) == [2]
    np.testing.assert_allclose(steering.sizes[:-1], 4)
    assert steering.facts()["resampled"] == [] and steering.forwards == 8 * 4


def test_one_dominant_value_makes_it_the_ancestor_of_all_and_noise_parts_the_copies():
    values, step = said([0, 0, 0, 0], [0, 50, 0, 0], *[[1, 1, 1, 1]] * 6), make_step("flow_sde")
    steering = make("smc", step, values, shares=(1.0,))
    x0 = denoise(velocity, step, SHAPE, SEEDS, steer=steering).x0
    assert steering.origin.tolist() == [1] * 4 and steering.resampled == [1] and steering.sizes[1] == pytest.approx(1)
    assert len({tuple(row.flatten().tolist()) for row in x0}) == 4
    steering = make("smc", step, said([0, 0, 0, 0], [0, 50, 0, 0], *[[1, 1, 1, 1]] * 6), shares=(1.0,))
    ode = denoise(velocity, make_step("euler"), SHAPE, SEEDS, steer=steering).x0
    assert torch.equal(ode, ode[:1].expand_as(ode))  # why smc refuses steps without noise


def test_the_product_of_weights_telescopes_to_the_reward_less_the_first_value():
    rng, step = np.random.default_rng(0), make_step("cps")
    values, rewards = rng.normal(size=(8, 4)), rng.normal(size=(4, 1))
    steering = make("smc", step, said(*values), shares=(1.0,), strength=2.0, resample_below=0.0, pick="sample")
    denoise(velocity, step, SHAPE, SEEDS, steer=steering)
    chosen = steering.choose(rewards)
    np.testing.assert_allclose(steering.log_weights, 2.0 * (rewards[:, 0] - values[0]))
    assert len(chosen) == 1


def test_a_resampled_particle_is_weighed_against_its_ancestors_value():
    values = [[0.0, 0, 0, 0], [0, 40.0, 0, 0], [40.0, 39, 41, 40]]
    steering = make("smc", make_step("cps"), said(*values), shares=(1.0,), strength=1.0)
    for k in range(3):
        steering.select(k, torch.zeros(4, *SHAPE))
    assert steering.resampled == [1]
    np.testing.assert_allclose(steering.log_weights, [0, -1, 1, 0])


def smc(*values, **settings):
    """Particles in noise that a critic has judged at the first len(values) steps."""
    steering = make("smc", make_step("cps"), said(*values), shares=(1.0,), strength=1.0, **settings)
    for k in range(len(values)):
        steering.select(k, torch.zeros(4, *SHAPE))
    return steering


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_particle_without_a_finite_value_weighs_nothing_and_the_others_as_without_it(broken):
    """e^5 = 148.413159, so weights are 1, 0, 1 and 148.413159, over 150.413159."""
    steering = smc([0.0, 0, 0, 0], [0, broken, 0, 5], resample_below=0.0)
    weights = normalised(steering.log_weights)
    np.testing.assert_allclose(weights, [0.00664835, 0, 0.00664835, 0.98670329], atol=1e-8)
    assert steering.sizes[-1] == pytest.approx(1.0270401, rel=1e-6) and steering.facts()["not_finite"] == 1
    without = np.exp([0.0, 0, 5]) / np.exp([0.0, 0, 5]).sum()
    np.testing.assert_allclose(weights[[0, 2, 3]], without)
    steering = smc([0.0, 0, 0, 0], [0, broken, 0, 5])
    assert steering.resampled == [1] and set(steering.origin.tolist()) <= {0, 2, 3}
    assert np.bincount(steering.origin, minlength=4)[3] >= 3  # at least the floor of 4 x .987


def test_a_particle_that_weighs_nothing_stays_so_until_it_is_replaced():
    steering = smc([0.0, 0, 0, 0], [0, math.nan, 0, 0], [0, 9, 0, 0], resample_below=0.0)
    np.testing.assert_allclose(normalised(steering.log_weights), [1 / 3, 0, 1 / 3, 1 / 3])
    assert steering.choose(np.array([[1.0], [50], [3], [2]])) == [2]
    replaced = smc([0.0, 0, 0, 0], [0, math.nan, 0, 0], [0, 1, 0, 0], resample_below=0.78)
    assert replaced.resampled == [1] and 1 not in replaced.origin
    np.testing.assert_allclose(replaced.log_weights, [0, 1, 0, 0])


def test_where_no_particle_has_a_finite_value_the_step_changes_nothing_and_the_gain_comes_later():
    nothing, later = [math.nan] * 4, [4.0, 3, 2, 1]
    first = [1.0, 2, 3, 4]
    for values in ([first, nothing, later], [nothing, first, later], [first, [math.inf] * 4, nothing, later]):
        steering = smc(*values, resample_below=0.0)
        np.testing.assert_allclose(steering.log_weights, np.subtract(later, first))
        assert np.isfinite(steering.sizes).all()
    steering = smc(nothing, nothing, pick="sample")
    assert steering.resampled == [] and steering.facts()["not_finite"] == 8
    np.testing.assert_allclose(steering.sizes, 4)
    assert len(steering.choose(np.full((4, 1), np.nan))) == 1


def test_the_particle_that_is_kept_has_a_known_reward_or_value_where_any_has():
    judged = smc([0.0, 0, 0, 0], [0, 1, math.nan, 0], resample_below=0.0)
    assert judged.choose(np.array([[math.nan], [math.nan], [9.0], [0.5]])) == [1]  # by its last value
    assert smc([0.0] * 4).choose(np.array([[math.nan], [math.inf], [-3.0], [-2.0]])) == [0]
    lost = smc([0.0, 0, 0, 0], [0, 1, 0, 0], [math.nan] * 4, resample_below=0.0)
    assert lost.choose(np.full((4, 1), np.nan)) == [1]  # by the weights of before


def test_drawing_by_weight_follows_the_weights_and_an_unjudged_image_keeps_its_last_value():
    counts = np.zeros(2)
    for seed in range(2000):
        steering = make("smc", make_step("cps"), said([0.0, 0.0]), (seed, 0), (1.0,), strength=1.0, pick="sample")
        steering.select(0, torch.zeros(2, *SHAPE))
        counts[steering.choose(np.array([[math.log(3)], [np.nan]]))] += 1
    assert counts[0] / 2000 == pytest.approx(0.75, abs=0.03)


def test_best_of_n_keeps_the_highest_reward_and_asks_no_critic():
    step = make_step("euler")
    steering = make("best_of_n", step, said(), n=4, shares=(0.75, -0.25))
    denoise(velocity, step, SHAPE, SEEDS, steer=steering)
    assert steering.choose(np.array([[1.0, 0], [2, 8], [np.nan, np.nan], [np.nan, -1.5]])) == [3]
    assert steering.forwards == 0
    with pytest.raises(UserError, match="no reward has a score"):
        steering.choose(np.full((4, 2), np.nan))


def test_best_of_n_keeps_and_prunes_to_rows_that_have_a_finite_number_first():
    step = make_step("euler")
    best = make("best_of_n", step, said(), n=4, shares=(1.0,))
    assert best.choose(np.array([[math.inf], [-2.0], [math.nan], [-1.0]])) == [3]
    pruned = make("best_of_n", step, said([math.inf, 1.0, math.nan, -7.0]), n=4, prune_at=2, keep=2, shares=(1.0,))
    assert pruned.select(2, torch.zeros(4, *SHAPE)) == [1, 3] and pruned.facts() == {"not_finite": 2}
    blind = make("best_of_n", step, said([math.nan] * 4), n=4, prune_at=2, keep=2, shares=(1.0,))
    assert blind.select(2, torch.zeros(4, *SHAPE)) == [0, 1]


def test_pruning_carries_on_the_most_promising_as_if_they_had_been_drawn_alone():
    def field(x, sigma):
        asked.append(len(x))
        return velocity(x, sigma)

    for kind in ("euler", "flow_sde"):
        step, asked = make_step(kind), []
        steering = make("best_of_n", step, said([1.0, 3.0, 0.0, 3.5]), n=4, prune_at=5, keep=2, shares=(1.0,))
        x0 = denoise(field, step, SHAPE, SEEDS, steer=steering).x0
        assert asked == [4] * 5 + [2] * 3 and steering.forwards == 4
        assert steering.origin.tolist() == [1, 3] and steering.values[:, 0].tolist() == [3.0, 3.5]
        assert torch.equal(x0, denoise(velocity, step, SHAPE, SEEDS).x0[[1, 3]])
        assert make("best_of_n", step, prune_at=5).choose(np.full((1, 1), np.nan)) == [0]


PROBLEMS = [
    ("best_of_n", {"keep": 2}, None, "steer.keep is 2, and nothing is pruned"),
    ("best_of_n", {"prune_at": 8}, None, "steer.prune_at is 8 .* with steps 0 to 7"),
    ("guided_best_of_n", {"n": 2, "prune_at": 4, "keep": 3}, None, "keep to 2 at most"),
    ("best_of_n", {}, "a star", "no reward judges 'a star'.*steer.prune_at=4"),
    ("guidance", {"low": 0.8, "high": 0.7}, None, "no step has a noise level from steer.low 0.8"),
    ("guided_best_of_n", {"prune_at": 1, "low": 0.99, "high": 0.995}, None, "nothing would be guided"),
]


def test_what_a_mode_cannot_do_is_one_sentence():
    for mode, settings, unjudged, sentence in PROBLEMS:
        kind = STEERING[mode]
        (problem,) = kind.problems(kind.Config(**settings), sd3_sigmas(8, 3.0), unjudged)
        assert re.search(sentence, problem)


def test_what_chooses_without_rewards_needs_none():
    for mode, settings in (("smc", {}), ("guidance", {}), ("best_of_n", {"prune_at": 4}), ("best_of_n", {"n": 1})):
        kind = STEERING[mode]
        assert not list(kind.problems(kind.Config(**settings), sd3_sigmas(8, 3.0), "a star"))


@pytest.mark.parametrize(
    ("backbone", "kind"), [("sd3", "euler"), ("sd3", "flow_sde"), ("sd1", "euler"), ("sd1", "ddim")]
)
def test_guidance_raises_the_value_of_what_a_real_network_draws(tiny_pipeline, backbone, kind):
    case = Case(backbone, tiny_pipeline(backbone)).backbone(lora={"rank": 2, "alpha": 4})
    actor = add_adapters(case, case.load_denoiser(), ("default", "critic"))
    critic = Critic(case, actor, 1, CriticSection(width=16, heads=2))
    shake(critic)
    step = STEPS[kind](STEPS[kind].Config(), case.sigmas(6), case.prediction)
    text = TextBatch.build(case.encode([TEXT]) * 4, None, torch.device("cpu"))

    def values(x, sigma):
        return critic(x, sigma, text.sequence, text.pooled)

    class Watched(STEERING["guidance"]):
        def select(self, k, x):
            states.append(x)

    def draw(scale):
        config = Watched.Config(scale=scale, clip=1.0, low=level - 1e-3, high=level + 1e-3)
        steering = Watched(config, step=step, value_function=values, shares=np.ones(1), seeds=SEEDS)
        states.clear()
        denoise(
            lambda x, sigma: case.velocity(actor, x, sigma, text.sequence, text.pooled),
            step,
            case.latent_shape,
            SEEDS,
            steer=steering,
        )
        with torch.no_grad():  # at the one level that was guided: a random critic says other things at other levels
            return values(states[4], torch.full((4,), level))[:, 0]

    states, level = [], float(step.sigmas[3])
    risen = draw(4.0) - draw(0.0)
    # A step leads away from where the gradient was taken, so a random critic need not rise for every single sample.
    assert risen.mean() > 1e-2 and (risen > 0).sum() >= 3
