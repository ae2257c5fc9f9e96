import pytest
import torch

from align_cluster.algorithms.terms import clipped_surrogate, gaussian_kl, nft_policy_loss

CLIP = 0.1


def surrogate_gradient(log_ratio: float, advantage: float) -> tuple[float, float]:
    """(loss, gradient with respect to the log-prob) of one sample."""
    ratio = torch.tensor([log_ratio], requires_grad=True)
    loss, _ = clipped_surrogate(ratio, torch.tensor([advantage]), CLIP, CLIP)
    loss.sum().backward()
    return loss.item(), ratio.grad.item()


@pytest.mark.parametrize("advantage", [-2.0, -0.5, 0.0, 0.5, 2.0])
def test_at_ratio_one_the_gradient_is_minus_the_advantage(advantage):
    assert surrogate_gradient(0.0, advantage) == pytest.approx((-advantage, -advantage))


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "clipped"),
    [(0.2, 1.0, True), (-0.2, 1.0, False), (0.2, -1.0, False), (-0.2, -1.0, True), (0.05, 1.0, False)],
)
def test_only_a_ratio_that_has_moved_as_far_as_asked_stops_teaching(log_ratio, advantage, clipped):
    loss, gradient = surrogate_gradient(log_ratio, advantage)
    ratio = torch.tensor(log_ratio).exp().item()
    if clipped:
        edge = 1 + CLIP if log_ratio > 0 else 1 - CLIP
        assert gradient == 0 and loss == pytest.approx(-advantage * edge)
    else:
        assert gradient == pytest.approx(-advantage * ratio) and loss == pytest.approx(-advantage * ratio)


def test_the_surrogate_is_never_below_the_unclipped_one():
    generator = torch.Generator().manual_seed(0)
    log_ratio, advantage = (torch.randn(500, generator=generator) for _ in range(2))
    loss, ratio = clipped_surrogate(log_ratio, advantage, CLIP, CLIP)
    torch.testing.assert_close(ratio, log_ratio.exp())
    assert (loss >= -advantage * ratio - 1e-6).all()


def test_the_three_kl_conventions_are_the_exact_divergence_times_known_factors():
    generator = torch.Generator().manual_seed(0)
    mean, reference = (torch.randn(4, 3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    std_t, dt = torch.tensor([1.4, 0.3, 2.0, 0.7], dtype=torch.float64), -0.1
    std = std_t * (-dt) ** 0.5
    laws = (torch.distributions.Normal(m, std.view(-1, 1, 1, 1)) for m in (mean, reference))
    exact = torch.distributions.kl_divergence(*laws).flatten(1)
    torch.testing.assert_close(gaussian_kl(mean, reference, std, std_t, "exact_sum"), exact.sum(1))
    torch.testing.assert_close(gaussian_kl(mean, reference, std, std_t, "exact_mean"), exact.mean(1))
    torch.testing.assert_close(gaussian_kl(mean, reference, std, std_t, "no_dt"), exact.mean(1) * -dt)


@pytest.mark.parametrize("mode", ["no_dt", "exact_mean", "exact_sum"])
def test_the_kl_of_equal_means_is_zero_and_so_is_its_gradient(mode):
    mean = torch.randn(2, 3, 4, 4).requires_grad_()
    kl = gaussian_kl(mean, mean.detach(), torch.tensor(0.3), torch.tensor(0.9), mode)
    kl.sum().backward()
    assert (kl == 0).all() and (mean.grad == 0).all()


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
