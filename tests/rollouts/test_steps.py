import math

import numpy as np
import pytest
import torch

from align_cluster.rollouts.schedule import sd3_sigmas, shift_map
from align_cluster.rollouts.steps import (
    STEPS,
    Dpm2,
    Euler,
    FlowSde,
    dpm2_step,
    euler_step,
    flow_sde_mean,
    gaussian_log_prob,
)

MEAN, SPREAD = 1.5, 0.5  # a Gaussian data law, whose velocity field and flow are known


def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[eps - x0 | x_t = x] for x0 ~ N(MEAN, SPREAD^2)."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    offset = (x - (1 - t) * MEAN) / variance
    return t * offset - MEAN - (1 - t) * SPREAD**2 * offset


def sample(kind: str, sigmas: np.ndarray, x: torch.Tensor, field=velocity, **settings) -> torch.Tensor:
    step = STEPS[kind](STEPS[kind].Config(**settings), sigmas)
    generator = torch.Generator().manual_seed(1)
    for k in range(len(sigmas) - 1):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype) if step.has_density else None
        x = step.advance(k, x, field(x, float(sigmas[k])), noise)
    return x


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_step_deviations_of_sd35_medium_are_golden():
    sigmas = sd3_sigmas(10, 3.0)
    step = FlowSde(FlowSde.Config(noise_level=0.7), sigmas)
    deviations = [step.mean(k, torch.zeros(1, 1), torch.zeros(1, 1))[1] for k in range(10)]
    golden = [0.7000, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.0063]
    np.testing.assert_allclose(deviations, golden, atol=5e-5)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_the_first_step_deviates_by_exactly_the_noise_level(shift):
    sigmas = sd3_sigmas(7, shift)
    step = FlowSde(FlowSde.Config(noise_level=0.9), sigmas)
    assert step.mean(0, torch.zeros(1, 1), torch.zeros(1, 1))[1] == pytest.approx(0.9, rel=1e-12)


def test_the_scalar_step_and_its_log_density_are_golden():
    x, v = torch.tensor([[1.0]]), torch.tensor([[0.5]])
    mean, std, std_t = flow_sde_mean(x, v, 0.8, 0.7, 0.96, 0.7)
    assert std_t == pytest.approx(1.4) and std == pytest.approx(0.442719, abs=1e-6)
    assert mean.item() == pytest.approx(0.81525, abs=1e-6)
    assert gaussian_log_prob(mean + 0.1, mean, std).item() == pytest.approx(-0.129628, abs=1e-6)


def test_the_log_density_is_the_mean_over_dimensions_of_the_normal_law():
    x, mean = latents(3, 4, 2, 5), latents(3, 4, 2, 5, seed=1)
    reference = torch.distributions.Normal(mean.double(), 0.37).log_prob(x.double()).mean((1, 2, 3))
    torch.testing.assert_close(gaussian_log_prob(x, mean, 0.37).double(), reference, rtol=1e-6, atol=1e-6)


def test_without_noise_the_sde_mean_is_the_euler_step():
    x, v = latents(2, 3, 4, 4).double(), latents(2, 3, 4, 4, seed=1).double()
    for sigma, sigma_next in [(1.0, 0.9), (0.6, 0.4), (0.01, 0.0)]:
        mean, std, _ = flow_sde_mean(x, v, sigma, sigma_next, 0.9, 1e-9)
        torch.testing.assert_close(mean, euler_step(x, v, sigma, sigma_next), rtol=0, atol=1e-12)
        assert std < 1e-7


def test_the_sde_mean_is_euler_with_a_langevin_term():
    x, v = latents(2, 3, 4, 4).double(), latents(2, 3, 4, 4, seed=1).double()
    for sigma, sigma_next in [(1.0, 0.9), (0.6, 0.4), (0.05, 0.0)]:
        mean, _, std_t = flow_sde_mean(x, v, sigma, sigma_next, 0.9, 0.7)
        score = -(x + (1 - sigma) * v) / sigma  # -eps_hat / sigma
        expected = euler_step(x, v, sigma, sigma_next) + 0.5 * std_t**2 * (sigma - sigma_next) * score
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["euler", "dpm2"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_every_ode_solver_lands_on_the_x0_that_a_network_insists_on(kind, steps):
    noise, x0 = latents(2, 3, 4, 4), latents(2, 3, 4, 4, seed=1)
    final = sample(kind, sd3_sigmas(steps, 3.0), noise, lambda x, sigma: (x - x0) / sigma)
    torch.testing.assert_close(final, x0, rtol=0, atol=1e-5)


def test_the_first_order_dpm_step_is_the_euler_step():
    x, v = latents(2, 3, 4, 4).double(), latents(2, 3, 4, 4, seed=1).double()
    x0 = x - 0.7 * v
    first_order = dpm2_step(x, x0, latents(2, 3, 4, 4, seed=2).double(), 1.0, 0.7, 0.5)
    torch.testing.assert_close(first_order, euler_step(x, v, 0.7, 0.5), rtol=1e-12, atol=1e-12)


def test_the_second_order_dpm_step_is_the_published_formula():
    x, m0, m1 = (latents(2, 3, seed=s).double() for s in range(3))
    s1, s0, st = 0.9, 0.7, 0.45
    lam = {s: math.log(1 - s) - math.log(s) for s in (s1, s0, st)}
    h, h0 = lam[st] - lam[s0], lam[s0] - lam[s1]
    d1 = (m0 - m1) / (h0 / h)
    expected = st / s0 * x - (1 - st) * (math.exp(-h) - 1) * m0 - 0.5 * (1 - st) * (math.exp(-h) - 1) * d1
    torch.testing.assert_close(dpm2_step(x, m0, m1, s1, s0, st), expected, rtol=1e-12, atol=1e-12)


def test_dpm_is_finite_and_first_order_where_the_half_log_snr_is_infinite():
    sigmas, x = sd3_sigmas(6, 3.0), latents(2, 3, 4, 4)
    dpm, euler = Dpm2(Dpm2.Config(), sigmas), Euler(Euler.Config(), sigmas)
    for k in range(6):
        v = velocity(x, float(sigmas[k]))
        ahead, plain = dpm.advance(k, x, v), euler.advance(k, x, v)
        assert torch.isfinite(ahead).all()
        first_order = torch.allclose(ahead, plain, rtol=0, atol=1e-6)
        assert first_order == (k in (0, 1, 5)), k
        x = ahead


@pytest.mark.parametrize(("steps", "dpm", "euler"), [(16, 0.065, 0.169), (32, 0.0039, 0.088), (64, 0.0082, 0.045)])
def test_dpm_more_than_halves_eulers_error_from_16_steps_on(steps, dpm, euler):
    sigmas = shift_map(np.linspace(1, 0, steps + 1), 3.0)
    noise = torch.linspace(-2, 2, 81, dtype=torch.float64)[:, None]
    exact = MEAN + SPREAD * noise  # the flow of a Gaussian law is affine
    error = {kind: (sample(kind, sigmas, noise) - exact).abs().max().item() for kind in ("dpm2", "euler")}
    assert error["dpm2"] < error["euler"] / 2
    assert error["dpm2"] == pytest.approx(dpm, rel=0.02) and error["euler"] == pytest.approx(euler, rel=0.02)


@pytest.mark.parametrize(("steps", "ode", "sde"), [(10, 0.431, 0.479), (50, 0.486, 0.499), (200, 0.497, 0.503)])
def test_the_sde_keeps_the_marginal_law_of_the_ode(steps, ode, sde):
    sigmas, noise = np.linspace(1, 0, steps + 1), latents(100_000, 1)
    deviation = {
        "euler": sample("euler", sigmas, noise).std().item(),
        "flow_sde": sample("flow_sde", sigmas, noise, noise_level=0.7).std().item(),
    }
    assert deviation["euler"] == pytest.approx(ode, abs=0.004)
    assert deviation["flow_sde"] == pytest.approx(sde, abs=0.006)


def test_the_log_density_of_a_drawn_latent_is_recomputed_bitwise():
    sigmas = sd3_sigmas(10, 3.0)
    draw, again = (FlowSde(FlowSde.Config(), sigmas) for _ in range(2))
    x, v = latents(5, 8, 6, 6), latents(5, 8, 6, 6, seed=1)
    for k in range(9):
        x_next = draw.advance(k, x, v, latents(5, 8, 6, 6, seed=2 + k))
        assert torch.equal(draw.log_prob(k, x, v, x_next), again.log_prob(k, x.clone(), v.clone(), x_next.clone()))
        x = x_next


def test_only_the_velocity_carries_gradient_of_a_log_density():
    step = FlowSde(FlowSde.Config(), sd3_sigmas(10, 3.0))
    x, x_next, v = latents(2, 3, 4, 4), latents(2, 3, 4, 4, seed=1), latents(2, 3, 4, 4, seed=2).requires_grad_()
    step.log_prob(3, x, v, x_next).sum().backward()
    mean, std, _ = step.mean(3, x, v.detach())
    gain = (step.mean(3, x, v.detach() + 1)[0] - mean).mean()
    torch.testing.assert_close(v.grad, (x_next - mean) / std**2 * gain / x[0].numel(), rtol=1e-3, atol=1e-6)
