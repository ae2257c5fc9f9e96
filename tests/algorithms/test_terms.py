import math

import numpy as np
import pytest
import torch

from align_cluster.algorithms.terms import clipped_surrogate, gaussian_kl, guarded_log_ratio, nft_policy_loss
from align_cluster.rollouts.steps import gaussian_log_prob

CLIP = 0.1
MODES = ["no_dt", "exact_mean", "exact_sum"]


def scalar_surrogate(log_ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """(loss, gradient with respect to the log-prob) of one sample: flat where its ratio has moved as far as asked."""
    ratio = math.exp(log_ratio)
    if advantage > 0 and ratio > 1 + high:
        return -advantage * (1 + high), 0.0
    if advantage < 0 and ratio < 1 - low:
        return -advantage * (1 - low), 0.0
    return -advantage * ratio, -advantage * ratio


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.1), (0.1, 0.3), (0.3, 0.1), (1e-4, 5e-4), (0.5, 1e-3)])
def test_the_surrogate_and_its_gradient_are_those_of_a_loop_over_samples(low, high):
    edges = [math.log(1 - low), math.log(1 + high)]
    grid = [edge * factor for edge in edges for factor in (0.0, 0.5, 0.999, 1.001, 2.0)]
    cases = [(log_ratio, advantage) for log_ratio in grid for advantage in (-2.0, -0.5, 0.0, 0.5, 2.0)]
    log_ratio, advantage = torch.tensor(cases, dtype=torch.float64).T
    loss, ratio = clipped_surrogate(log_ratio.requires_grad_(), advantage, low, high)
    loss.sum().backward()
    expected = torch.tensor([scalar_surrogate(*case, low, high) for case in cases], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), expected[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_ratio.grad, expected[:, 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ratio.detach(), log_ratio.detach().exp())
    stopped = (expected[:, 1] == 0) & (advantage != 0)
    assert stopped.sum() == 8  # two positive advantages at two ratios above, two negative ones at two below


@pytest.mark.parametrize("advantage", [-2.0, -0.5, 0.0, 0.5, 2.0])
def test_at_ratio_one_the_gradient_is_minus_the_advantage(advantage):
    log_ratio = torch.zeros(1, requires_grad=True)
    loss, _ = clipped_surrogate(log_ratio, torch.tensor([advantage]), CLIP, 2 * CLIP)
    loss.sum().backward()
    assert (loss.item(), log_ratio.grad.item()) == pytest.approx((-advantage, -advantage))


def test_the_surrogate_is_never_below_the_unclipped_one():
    generator = torch.Generator().manual_seed(0)
    log_ratio, advantage = (torch.randn(500, generator=generator) for _ in range(2))
    loss, ratio = clipped_surrogate(log_ratio, advantage, CLIP, CLIP)
    torch.testing.assert_close(ratio, log_ratio.exp())
    assert (loss >= -advantage * ratio - 1e-6).all()


def test_the_three_kl_conventions_are_the_exact_divergence_times_known_factors():
    generator = torch.Generator().manual_seed(0)
    mean, reference = (torch.randn(4, 3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    std_t, dt = torch.tensor([[1.4, 0.3, 2.0, 0.7], [-0.1, -0.02, -0.4, -0.2]], dtype=torch.float64)
    std = std_t * torch.sqrt(-dt)
    found = {mode: gaussian_kl(mean, reference, std, std_t, mode) for mode in MODES}
    for i in range(4):
        laws = (torch.distributions.Normal(m[i], std[i]) for m in (mean, reference))
        exact = torch.distributions.kl_divergence(*laws)
        torch.testing.assert_close(found["exact_sum"][i], exact.sum())
        torch.testing.assert_close(found["exact_mean"][i], exact.mean())
        torch.testing.assert_close(found["no_dt"][i], exact.mean() * -dt[i])


@pytest.mark.parametrize("mode", MODES)
def test_the_kl_of_equal_means_is_zero_and_so_is_its_gradient(mode):
    mean = torch.randn(2, 3, 4, 4).requires_grad_()
    kl = gaussian_kl(mean, mean.detach(), torch.tensor([0.3, 0.01]), torch.tensor([0.9, 0.1]), mode)
    kl.sum().backward()
    assert (kl == 0).all() and (mean.grad == 0).all()


STDS = (0.006, 0.2, 0.7, 1.5)  # all that occurs, from a last step of ten to a first one


def moved_step(draws: int, dims: int, std: float) -> dict[str, torch.Tensor]:
    """`draws` noises of one step whose mean has moved since by about as much as its deviation; fp64."""
    generator = torch.Generator().manual_seed(3)
    old, shift = torch.randn(2, 1, dims, generator=generator, dtype=torch.float64)
    z = torch.randn(draws, dims, generator=generator, dtype=torch.float64)
    stds = torch.full((draws,), std, dtype=torch.float64)
    old = old.expand(draws, dims)
    mean = (old + std * shift / math.sqrt(dims)).requires_grad_()
    log_prob, log_prob_old = (gaussian_log_prob(old + std * z, m, stds) for m in (mean, old))
    guarded = guarded_log_ratio(old + std * z, mean, old, stds)
    return {"z": z, "old": old, "mean": mean, "plain": log_prob - log_prob_old, "guarded": guarded}


@pytest.mark.parametrize("std", STDS)
def test_a_guarded_log_ratio_is_the_shift_of_the_mean_along_the_noise(std):
    step = moved_step(50, 24, std)
    along = ((step["mean"] - step["old"]) * step["z"]).mean(1)
    torch.testing.assert_close(step["guarded"], along, rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(step["guarded"].sum(), step["mean"])
    torch.testing.assert_close(gradient, step["z"] / 24, rtol=0, atol=1e-10)


def test_samples_at_different_steps_are_guarded_by_their_own_deviations():
    generator = torch.Generator().manual_seed(0)
    old, shift, z = torch.randn(3, len(STDS), 4, 2, 3, generator=generator, dtype=torch.float64)
    stds = torch.tensor(STDS, dtype=torch.float64)
    x_next, mean = old + stds.view(-1, 1, 1, 1) * z, old + 0.1 * shift
    log_ratio = gaussian_log_prob(x_next, mean, stds) - gaussian_log_prob(x_next, old, stds)
    guarded = guarded_log_ratio(x_next, mean, old, stds)
    bias = ((mean - old) ** 2).mean((1, 2, 3)) / (2 * stds**2)
    torch.testing.assert_close(guarded, (log_ratio + bias) * stds, rtol=0, atol=1e-10)  # the paper's form
    torch.testing.assert_close(guarded, 0.1 * (shift * z).mean((1, 2, 3)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("std", STDS)
def test_at_the_old_mean_a_guarded_ratio_is_one_and_its_gradient_the_deviation_times_the_plain_one(std):
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stds, old = torch.full((6,), std, dtype=torch.float64), torch.zeros(6, 5, dtype=torch.float64)
    mean = old.clone().requires_grad_()
    log_ratio = gaussian_log_prob(old + std * z, mean, stds) - gaussian_log_prob(old + std * z, old, stds)
    guarded = guarded_log_ratio(old + std * z, mean, old, stds)
    assert (guarded.exp() == 1).all()
    (plain,) = torch.autograd.grad(log_ratio.sum(), mean, retain_graph=True)
    (gradient,) = torch.autograd.grad(guarded.sum(), mean)
    torch.testing.assert_close(gradient, std * plain, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("std", STDS)
def test_a_guarded_log_ratio_has_no_bias_and_a_plain_one_has_that_of_the_moved_mean(std):
    draws, dims = 20_000, 16
    step = moved_step(draws, dims, std)
    mean, plain, guarded = (step[name].detach() for name in ("mean", "plain", "guarded"))
    distance = float((mean - step["old"])[0].norm())
    bias = -(distance**2) / (2 * std**2 * dims)
    # Both are affine in z with deviations distance / (std dims) and distance / dims: five standard errors of the mean.
    assert plain.mean().item() == pytest.approx(bias, abs=5 * distance / (std * dims) / math.sqrt(draws))
    tolerance = 5 * distance / dims / math.sqrt(draws)
    assert guarded.mean().item() == pytest.approx(0, abs=tolerance)
    assert abs(bias) * std > 5 * tolerance  # a guard that left the bias in would be seen
    # A sample deviation has a standard error of 1 / sqrt(2 draws) of it.
    assert guarded.std().item() == pytest.approx(distance / dims, rel=5 / math.sqrt(2 * draws))


def nft_example(batch: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise, v_old, change = (torch.randn(batch, 3, 2, 2, generator=generator).double() for _ in range(4))
    sigma = torch.rand(batch, generator=generator).double() * 0.9 + 0.1
    level = sigma.view(-1, 1, 1, 1)
    return {
        "v": v_old + 0.2 * change,
        "v_old": v_old,
        "x_t": (1 - level) * x0 + level * noise,
        "sigma": sigma,
        "x0": x0,
        "optimality": torch.rand(batch, generator=generator).double(),
    }


def one_loss(v, x_t, sigma, x0, weight=None):
    """The self-normalised regression of one sample onto its x0, and its normaliser."""
    error = x_t - sigma * v - x0
    weight = error.abs().mean().item() if weight is None else weight
    return (error**2).mean() / weight, weight


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_the_nft_loss_is_its_definition_sample_by_sample(beta):
    given = nft_example()
    losses = nft_policy_loss(**given, beta=beta, advantage_clip=5.0)
    for i in range(5):
        v, v_old, x_t, t, x0, r = (given[name][i] for name in given)
        positive, negative = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
        torch.testing.assert_close(positive + negative, 2 * v_old)
        value = r * one_loss(positive, x_t, t, x0)[0] + (1 - r) * one_loss(negative, x_t, t, x0)[0]
        assert losses[i].item() == pytest.approx((5.0 / beta * value).item(), rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_nft_gradient_is_the_derivative_of_its_definition_by_hand(beta):
    given = nft_example()
    given["v"] = given["v"].requires_grad_()
    nft_policy_loss(**given, beta=beta, advantage_clip=5.0).sum().backward()
    v, v_old, x_t, x0 = (given[name].detach().numpy().reshape(5, -1) for name in ("v", "v_old", "x_t", "x0"))
    t, r = (given[name].numpy()[:, None] for name in ("sigma", "optimality"))
    expected = 0.0
    for share, sign in ((r, 1), (1 - r, -1)):  # the good side regresses on v, the bad one away from it
        error = x_t - t * (v_old + sign * beta * (v - v_old)) - x0
        expected -= sign * 5.0 * share * t * 2 * error / error.shape[1] / abs(error).mean(1, keepdims=True)
    np.testing.assert_allclose(given["v"].grad.numpy().reshape(5, -1), expected, rtol=1e-6, atol=1e-9)


def test_at_the_old_velocity_the_nft_value_does_not_depend_on_optimality():
    given = nft_example()
    given["v"] = given["v_old"]
    first = nft_policy_loss(**given, beta=0.5, advantage_clip=5.0)
    second = nft_policy_loss(**(given | {"optimality": 1 - given["optimality"]}), beta=0.5, advantage_clip=5.0)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("clip", [1.0, 5.0])
def test_at_the_old_velocity_the_nft_gradient_is_the_advantage_times_plain_regression(beta, clip):
    given = nft_example(seed=1)
    advantage = torch.tensor([-clip, -0.3, 0.0, 0.7, clip]).double()
    given["optimality"] = advantage / (2 * clip) + 0.5
    given["v"] = given["v_old"].clone().requires_grad_()
    nft_policy_loss(**given, beta=beta, advantage_clip=clip).sum().backward()
    v_old, x_t, sigma, x0 = (given[name] for name in ("v_old", "x_t", "sigma", "x0"))
    for i in range(5):
        _, weight = one_loss(v_old[i], x_t[i], sigma[i], x0[i])
        for index in [(0, 0, 0), (2, 1, 1)]:
            step = torch.zeros_like(v_old[i])
            step[index] = 1e-5
            ahead, behind = (one_loss(v_old[i] + sign * step, x_t[i], sigma[i], x0[i], weight)[0] for sign in (1, -1))
            slope = ((ahead - behind) / 2e-5).item()
            assert given["v"].grad[i][index].item() == pytest.approx(advantage[i].item() * slope, rel=1e-4, abs=1e-7)


def test_optimality_one_half_teaches_nothing_at_the_old_velocity():
    given = nft_example()
    given["v"] = given["v_old"].clone().requires_grad_()
    given["optimality"] = torch.full((5,), 0.5).double()
    nft_policy_loss(**given, beta=0.1, advantage_clip=5.0).sum().backward()
    assert given["v"].grad.abs().max() < 1e-6


def test_beta_one_and_optimality_one_is_regression_onto_own_samples():
    given = nft_example()
    given["optimality"] = torch.ones(5).double()
    losses = nft_policy_loss(**given, beta=1.0, advantage_clip=5.0)
    for i in range(5):
        expected = 5 * one_loss(given["v"][i], given["x_t"][i], given["sigma"][i], given["x0"][i])[0]
        assert losses[i].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0, 1.7])
def test_swapping_good_and_bad_with_the_sign_of_beta_changes_nothing(beta):
    given = nft_example()
    swapped = given | {"optimality": 1 - given["optimality"]}
    first = beta * nft_policy_loss(**given, beta=beta, advantage_clip=5.0)
    second = -beta * nft_policy_loss(**swapped, beta=-beta, advantage_clip=5.0)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


def test_the_nft_weights_carry_no_gradient_and_a_perfect_sample_divides_by_no_zero():
    given = nft_example()
    level = given["sigma"].view(-1, 1, 1, 1)
    given["v"] = given["v_old"] = ((given["x_t"] - given["x0"]) / level).requires_grad_()
    loss = nft_policy_loss(**given, beta=1.0, advantage_clip=5.0)
    (gradient,) = torch.autograd.grad(loss.sum(), given["v"])
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all() and loss.max() < 1e-6


@pytest.mark.parametrize("log_ratio", [0.01, 30.0, 1e4, math.inf, math.nan, -1e4])
def test_a_sample_without_an_advantage_adds_nothing_whatever_its_ratio(log_ratio):
    """Neither to the loss nor to the gradient, which a product of 0 and infinity would spoil for the whole batch."""
    own = torch.tensor([0.05, log_ratio], requires_grad=True)
    loss, _ = clipped_surrogate(own, torch.tensor([1.5, 0.0]), CLIP, CLIP)
    loss.sum().backward()
    alone, advantage = torch.tensor([0.05], requires_grad=True), torch.tensor([1.5])
    expected, _ = clipped_surrogate(alone, advantage, CLIP, CLIP)
    expected.sum().backward()
    assert loss.tolist() == [expected.item(), 0] and own.grad.tolist() == [alone.grad.item(), 0]


@pytest.mark.parametrize("advantage", [-3.0, 3.0])
@pytest.mark.parametrize("log_ratio", [25.0, 90.0, 1e4, -90.0, -1e4])
def test_a_ratio_that_would_overflow_has_a_finite_loss_and_gradient(log_ratio, advantage):
    own = torch.tensor([log_ratio], requires_grad=True)
    loss, _ = clipped_surrogate(own, torch.tensor([advantage]), CLIP, CLIP)
    loss.sum().backward()
    assert loss.isfinite().all() and own.grad.isfinite().all()
    if advantage > 0 and log_ratio > 0:
        assert loss.item() == pytest.approx(-advantage * (1 + CLIP))
