import math

import numpy as np
import pytest
import torch

from align_cluster.backbones.levels import ddim_levels, ddim_timesteps, linear_sigmas, sd3_sigmas, shift_map
from align_cluster.rollouts.steps import (
    STEPS,
    Coefficients,
    DanceSde,
    Ddim,
    Dpm2,
    Euler,
    FlowSde,
    NoisyStep,
    Step,
    cps_coefficients,
    dance_sde_coefficients,
    ddim_coefficients,
    dpm2_step,
    euler_coefficients,
    flow_ddim_coefficients,
    flow_sde_coefficients,
    gaussian_log_prob,
)

from ..cases import each

MEAN, SPREAD = 1.5, 0.5  # a Gaussian data law, whose velocity field and flow are known
FLOW = {
    "flow_sde": flow_sde_coefficients,
    "dance_sde": dance_sde_coefficients,
    "cps": cps_coefficients,
    "flow_ddim": flow_ddim_coefficients,
}
NOISY = [*((kind, "flow") for kind in FLOW), ("ddim", "epsilon"), ("ddim", "v")]
SIGMA, SIGMA_NEXT = 0.8, 0.7


def velocity(x, t: float):
    """E[eps - x0 | x_t = x] for x0 ~ N(MEAN, SPREAD^2)."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    offset = (x - (1 - t) * MEAN) / variance
    return t * offset - MEAN - (1 - t) * SPREAD**2 * offset


def build(kind: str, steps: int = 10, prediction: str = "flow", **settings) -> Step:
    levels = ddim_levels(steps) if kind == "ddim" else sd3_sigmas(steps, 3.0)
    return STEPS[kind](STEPS[kind].Config(**settings), levels, prediction)


def sample(kind: str, sigmas: np.ndarray, x: torch.Tensor, field=velocity, **settings) -> torch.Tensor:
    step = STEPS[kind](STEPS[kind].Config(**settings), sigmas)
    generator = torch.Generator().manual_seed(1)
    for k in range(len(sigmas) - 1):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype) if step.has_density else None
        x = step.advance(k, x, field(x, float(sigmas[k])), noise)
    return x


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(k: int, size: int) -> torch.Tensor:
    return torch.full((size,), k)


def applied(table: Coefficients, x: float, output: float, k: int = 0) -> float:
    return table.x[k] * x + table.output[k] * output


def test_step_deviations_of_sd35_medium_are_golden():
    golden = [0.7000, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.0063]
    np.testing.assert_allclose(flow_sde_coefficients(sd3_sigmas(10, 3.0), 0.7).std, golden, atol=5e-5)


@each("shift", [0.3, 1.0, 3.0])
@each("steps", [1, 2, 7])
def test_the_first_flow_sde_step_deviates_by_exactly_the_noise_level(shift, steps):
    assert flow_sde_coefficients(sd3_sigmas(steps, shift), 0.9).std[0] == pytest.approx(0.9, rel=1e-12)


@each(
    ("kind", "noise", "mean", "std"),
    [
        ("flow_sde", 0.7, 0.81525, 0.442719),
        ("dance_sde", 0.3, 0.943812, 0.094868),
        ("cps", 0.8, 0.417943, 0.665740),
        ("flow_ddim", 0.7, 0.813433, 0.397994),
    ],
)
def test_the_scalar_steps_are_golden(kind, noise, mean, std):
    table = FLOW[kind](np.array([SIGMA, SIGMA_NEXT]), noise)
    assert applied(table, 1.0, 0.5) == pytest.approx(mean, abs=1e-6)
    assert table.std[0] == pytest.approx(std, abs=1e-6)


def test_the_log_density_of_the_scalar_flow_sde_step_is_golden():
    step = FlowSde(FlowSde.Config(), np.array([SIGMA, SIGMA_NEXT]))
    mean, std, std_t = step.mean(filled(0, 1), torch.tensor([[1.0]]), torch.tensor([[0.5]]))
    assert std_t.item() == pytest.approx(1.4, rel=1e-6)
    assert step.density(mean, std, mean + 0.1).item() == pytest.approx(-0.129628, abs=1e-6)


def test_a_dancegrpo_rollout_is_the_one_written_in_numpy_with_its_densities_and_its_last_image():
    sigmas, x, rng = linear_sigmas(16, 3.0), latents(3, 4, 2, 2).double(), np.random.default_rng(0)
    step, mine = DanceSde(DanceSde.Config(eta=0.3), sigmas), x.numpy()
    for k in range(16):
        v, noise = velocity(x, float(sigmas[k])), torch.from_numpy(rng.standard_normal(x.shape))
        mean, std, _ = step.mean(filled(k, 3), x, v)
        x = step.advance(k, x, v, noise if step.is_noisy(k) else None)
        now, dt = sigmas[k], sigmas[k + 1] - sigmas[k]
        clean = mine - now * velocity(mine, now)
        score = -(mine - (1 - now) * clean) / now**2
        middle, spread = mine + velocity(mine, now) * dt - 0.5 * 0.3**2 * score * dt, 0.3 * np.sqrt(-dt)
        mine = middle + spread * noise.numpy() if k < 15 else clean
        np.testing.assert_allclose(x.numpy(), mine, rtol=0, atol=1e-5)
        if k < 15:
            law = -((mine - middle) ** 2) / (2 * spread**2) - np.log(spread * np.sqrt(2 * np.pi))
            found = step.density(mean, std, x).numpy()
            np.testing.assert_allclose(found, law.mean((1, 2, 3)), rtol=0, atol=1e-5)


def test_the_step_deviations_of_ddim_on_stable_diffusion_are_golden():
    std, timesteps = ddim_coefficients(ddim_levels(50), 1.0, "epsilon").std, list(ddim_timesteps(50))
    golden = {981: 0.454463, 501: 0.294785, 21: 0.039480, 1: 0.020648}
    np.testing.assert_allclose([std[timesteps.index(t)] for t in golden], list(golden.values()), atol=1e-6)


@each("kind", FLOW)
def test_without_noise_every_flow_kind_is_the_euler_step(kind):
    for sigmas in (sd3_sigmas(10, 3.0), linear_sigmas(7, 1.0)):
        table, euler = FLOW[kind](sigmas, 0.0), euler_coefficients(sigmas)
        np.testing.assert_allclose(table.x, euler.x, rtol=0, atol=1e-12)
        np.testing.assert_allclose(table.output, euler.output, rtol=0, atol=1e-12)
        assert (table.std == 0).all()


@each(("sigma", "after"), [(1.0, 0.9), (0.6, 0.4), (0.05, 0.0)])
def test_the_flow_kinds_are_their_published_formulas(sigma, after):
    x, v, sigmas = 0.3, -1.2, np.array([sigma, after])
    x0, eps = x - sigma * v, x + (1 - sigma) * v
    dt, score = after - sigma, -(x - (1 - sigma) * x0) / sigma**2

    flow_std_t = 0.7 * math.sqrt(sigma / (1 - (sigma if sigma < 1 else after)))
    for kind, noise, std_t in (("flow_sde", 0.7, flow_std_t), ("dance_sde", 0.3, 0.3)):
        table = FLOW[kind](sigmas, noise)
        assert applied(table, x, v) == pytest.approx(x + v * dt - 0.5 * std_t**2 * score * dt, rel=1e-12)
        assert table.std_t[0] == pytest.approx(std_t, rel=1e-12)
        assert table.std[0] == pytest.approx(std_t * math.sqrt(-dt), rel=1e-12)

    table, std = cps_coefficients(sigmas, 0.8), after * math.sin(0.4 * math.pi)
    assert applied(table, x, v) == pytest.approx((1 - after) * x0 + math.sqrt(after**2 - std**2) * eps, rel=1e-12)
    assert table.std[0] == table.std_t[0] == pytest.approx(std, rel=1e-12)

    table = flow_ddim_coefficients(sigmas, 0.7)
    std = 0.7 * after * math.sqrt(1 - after**2 * (1 - sigma) ** 2 / (sigma**2 * (1 - after) ** 2))
    assert applied(table, x, v) == pytest.approx((1 - after) * x0 + math.sqrt(after**2 - std**2) * eps, rel=1e-12)
    assert table.std[0] == table.std_t[0] == pytest.approx(std, rel=1e-12)


@each("kind", ["cps", "flow_ddim"])
@each("noise", [0.3, 0.8, 1.0])
def test_old_and_new_noise_together_have_the_power_of_the_next_level(kind, noise):
    sigmas = sd3_sigmas(10, 3.0)
    table = FLOW[kind](sigmas, noise)
    kept = table.output + table.x * sigmas[:-1]  # a x + b v = (...) x0_hat + (b + a sigma) eps_hat
    np.testing.assert_allclose(kept**2 + table.std**2, sigmas[1:] ** 2, rtol=0, atol=1e-12)


@each("prediction", ["epsilon", "v"])
@each("eta", [0.0, 1.0])
@each("steps", [10, 50])
def test_ddim_steps_are_those_of_the_diffusers_scheduler(prediction, eta, steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon" if prediction == "epsilon" else "v_prediction",
    )
    scheduler.set_timesteps(steps)
    step = build("ddim", steps, prediction)
    for k, t in enumerate(scheduler.timesteps):
        x, output, noise = (latents(2, 4, 3, 3, seed=s) for s in (k, k + 100, k + 200))
        theirs = scheduler.step(output, int(t), x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(step.advance(k, x, output, noise if eta else None), theirs, rtol=2e-4, atol=2e-5)


def test_ddim_with_eta_1_is_the_ddpm_scheduler_of_stable_diffusion_as_refl_draws_with_it():
    """Diffusers' DDPM from SD1.4's scheduler settings, 40 steps. Its last step ends at noise 0, ours at timestep 0."""
    from diffusers import DDPMScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDPMScheduler(**betas, clip_sample=False, steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(40)
    assert scheduler.timesteps.tolist() == ddim_timesteps(40).tolist()
    step = build("ddim", 40, "epsilon")
    for k, t in enumerate(scheduler.timesteps[:-1]):
        x, output = (latents(2, 4, 3, 3, seed=s) for s in (k, k + 100))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
        theirs = scheduler.step(output, int(t), x, generator=torch.Generator().manual_seed(k))
        torch.testing.assert_close(step.advance(k, x, output, noise), theirs.prev_sample, rtol=2e-4, atol=2e-5)


def test_a_v_model_may_start_at_pure_noise_and_an_epsilon_model_may_not():
    levels = np.append(1.0, ddim_levels(10)[1:])
    for eta in (0.0, 1.0):
        table = ddim_coefficients(levels, eta, "v")
        assert all(np.isfinite(values).all() for values in vars(table).values())
        assert table.output[0] == pytest.approx(-math.sqrt(1 - levels[1] ** 2))  # x0_hat = -v at level 1
    with pytest.raises(ValueError, match="noise level 1"):
        ddim_coefficients(levels, 1.0, "epsilon")


@each(("kind", "prediction"), NOISY)
@each("steps", [1, 2, 3, 10, 40])
def test_every_table_is_finite_and_only_a_last_step_may_lack_noise(kind, prediction, steps):
    step = build(kind, steps, prediction)
    for table in (step.coefficients(), step.deterministic()):
        assert all(values.shape == (steps,) and np.isfinite(values).all() for values in vars(table).values())
    assert (step.coefficients().std[:-1] > 0).all() and (step.deterministic().std == 0).all()


@each("kind", ["cps", "flow_ddim"])
def test_a_last_step_without_noise_gives_the_predicted_x0(kind):
    step, x, v = build(kind), latents(2, 3, 4, 4), latents(2, 3, 4, 4, seed=1)
    final = step.advance(9, x, v, latents(2, 3, 4, 4, seed=2))
    torch.testing.assert_close(final, x - float(step.sigmas[9]) * v, rtol=0, atol=1e-6)


@each(("kind", "prediction"), NOISY)
def test_without_a_noise_tensor_a_noisy_kind_takes_its_ode_step(kind, prediction):
    step, x, output = build(kind, prediction=prediction), latents(2, 3, 4, 4), latents(2, 3, 4, 4, seed=1)
    for k in range(10):
        if kind == "ddim":
            table = ddim_coefficients(step.sigmas, 0.0, prediction)
            ode = x * float(table.x[k]) + output * float(table.output[k])
        else:
            ode = x + output * float(step.sigmas[k + 1] - step.sigmas[k])
        assert torch.equal(step.advance(k, x, output, None), ode)


@each(("kind", "prediction"), NOISY)
def test_the_log_density_of_a_drawn_latent_is_recomputed_bitwise(kind, prediction):
    draw, again = (build(kind, prediction=prediction) for _ in range(2))
    x, output = latents(5, 8, 6, 6), latents(5, 8, 6, 6, seed=1)
    for k in range(9):
        noise = latents(5, 8, 6, 6, seed=2 + k)
        x_next = draw.advance(k, x, output, noise)
        mean, std, _ = draw.mean(filled(k, 5), x, output)
        assert torch.equal(x_next, mean + std.view(5, 1, 1, 1) * noise)
        log_prob = draw.log_prob(filled(k, 5), x, output, x_next)
        assert torch.isfinite(log_prob).all() and torch.equal(log_prob, draw.density(mean, std, x_next))
        assert torch.equal(log_prob, again.log_prob(filled(k, 5), x.clone(), output.clone(), x_next.clone()))
        x = x_next


@each(("kind", "prediction"), NOISY)
def test_samples_at_different_steps_compute_the_bits_of_samples_at_one_step(kind, prediction):
    step, mixed = build(kind, prediction=prediction), torch.tensor([7, 0, 3, 3, 8])
    x, output, x_next = (latents(5, 8, 6, 6, seed=s) for s in range(3))
    together = (*step.mean(mixed, x, output), step.log_prob(mixed, x, output, x_next), step.fed(mixed))
    for row, k in enumerate(mixed.tolist()):
        same = filled(k, 5)
        alone = (*step.mean(same, x, output), step.log_prob(same, x, output, x_next), step.fed(same))
        assert all(torch.equal(a[row], b[row]) for a, b in zip(together, alone, strict=True))


@each(("kind", "prediction"), NOISY)
def test_only_the_output_carries_gradient_of_a_log_density(kind, prediction):
    step, k = build(kind, prediction=prediction), torch.tensor([3, 6])
    x, x_next, output = (latents(2, 3, 4, 4, seed=s) for s in range(3))
    step.log_prob(k, x, output.requires_grad_(), x_next).sum().backward()
    table = step.coefficients()
    gain, std = (torch.from_numpy(values[k]).view(2, 1, 1, 1) for values in (table.output, table.std))
    mean = torch.from_numpy(table.x[k]).view(2, 1, 1, 1) * x.double() + gain * output.detach().double()
    slope = 2.0 if kind == "cps" else 1 / std**2
    expected = slope * (x_next.double() - mean) * gain / x[0].numel()
    torch.testing.assert_close(output.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_gaussian_log_density_is_the_mean_over_dimensions_of_the_normal_law():
    x, mean, std = latents(3, 4, 2, 5), latents(3, 4, 2, 5, seed=1), torch.tensor([0.37, 1.0, 2.5])
    law = torch.distributions.Normal(mean.double(), std.double().view(3, 1, 1, 1))
    reference = law.log_prob(x.double()).mean((1, 2, 3))
    torch.testing.assert_close(gaussian_log_prob(x, mean, std).double(), reference, rtol=1e-6, atol=1e-6)


def test_the_density_of_cps_is_the_mean_squared_error_alone():
    step, x_next, mean = build("cps"), latents(3, 4, 2, 5), latents(3, 4, 2, 5, seed=1)
    expected = -torch.nn.functional.mse_loss(x_next, mean, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(step.density(mean, torch.tensor([0.1, 1.0, 9.0]), x_next), expected)


def test_the_network_is_fed_the_level_in_fp32_and_truncated_where_asked():
    k = torch.tensor([0, 5, 9, 5])
    for kind in sorted(set(STEPS) - {"ddim"}):
        step = build(kind)
        assert step.fed(k).dtype == torch.float32 and torch.equal(step.fed(k), step.level(k))
        np.testing.assert_array_equal(step.level(k).numpy(), sd3_sigmas(10, 3.0)[k].astype(np.float32))
    sigmas = linear_sigmas(16, 3.0)
    timesteps = [int(1000 * sigma) for sigma in torch.from_numpy(sigmas[:-1]).float()]
    assert timesteps[1] == 978 and timesteps[4] == 900 and timesteps[-1] == 166
    for kind in (DanceSde, Euler):
        exact, cut = (kind(kind.Config(truncate_timesteps=truncate), sigmas) for truncate in (False, True))
        assert torch.equal(cut.fed(torch.arange(16)), torch.tensor(timesteps) / 1000)
        assert torch.equal(cut.level(torch.arange(16)), exact.level(torch.arange(16)))
        x, output = latents(2, 4, 2, 5), latents(2, 4, 2, 5, seed=1)
        assert torch.equal(cut.advance(1, x, output), exact.advance(1, x, output))


def test_each_kind_takes_the_predictions_that_it_is_for():
    assert {kind for kind, step in STEPS.items() if issubclass(step, NoisyStep)} == {*FLOW, "ddim"}
    assert all(step.has_density == issubclass(step, NoisyStep) for step in STEPS.values())
    assert [kind for kind, step in STEPS.items() if not step.terminal_noise] == ["dance_sde"]
    with pytest.raises(ValueError, match="flow"):
        Ddim(Ddim.Config(), ddim_levels(10), "flow")
    for kind in sorted(set(STEPS) - {"ddim"}):
        with pytest.raises(ValueError, match="epsilon"):
            build(kind, prediction="epsilon")


def final_law(table: Coefficients, sigmas: np.ndarray) -> tuple[float, float]:
    """Exact mean and deviation of the final samples under the analytic velocity, which is affine in x."""
    mean, variance = 0.0, 1.0
    for k, sigma in enumerate(sigmas[:-1]):
        slope = velocity(1.0, sigma) - velocity(0.0, sigma)
        mean = applied(table, mean, velocity(mean, sigma), k)
        variance = (table.x[k] + table.output[k] * slope) ** 2 * variance + table.std[k] ** 2
    return mean, math.sqrt(variance)


# The golden deviations were measured with 2e5 samples, hence a standard error of .0008, and rounded to three decimals.
@each(
    ("kind", "noise", "golden"),
    [
        ("euler", None, (0.431, 0.486, 0.497, 0.499)),
        ("flow_sde", 0.7, (0.479, 0.499, 0.503, 0.500)),
        ("dance_sde", 0.3, (0.442, 0.487, 0.498, 0.499)),
        ("cps", 0.8, (0.352, 0.388, 0.400, 0.403)),
    ],
)
def test_an_sde_keeps_the_marginal_law_and_cps_contracts_it(kind, noise, golden):
    for steps, deviation in zip((10, 50, 200, 1000), golden, strict=True):
        sigmas = np.linspace(1, 0, steps + 1)
        mean, std = final_law(FLOW[kind](sigmas, noise) if noise else euler_coefficients(sigmas), sigmas)
        assert mean == pytest.approx(MEAN, abs=1e-9)
        assert std == pytest.approx(deviation, abs=0.003), steps
    if kind != "cps":
        assert std == pytest.approx(SPREAD, abs=0.002)


@each("kind", FLOW)
def test_drawn_samples_have_the_law_that_the_tables_promise(kind):
    # 20,000 samples: standard errors of mean and deviation are below .0036 and .0025; the bounds are four of them.
    sigmas = np.linspace(1, 0, 11)
    final = sample(kind, sigmas, latents(20_000, 1))
    mean, std = final_law(STEPS[kind](STEPS[kind].Config(), sigmas).coefficients(), sigmas)
    assert final.mean().item() == pytest.approx(mean, abs=0.0145)
    assert final.std().item() == pytest.approx(std, abs=0.01)


@each("kind", ["euler", "dpm2"])
@each("steps", [1, 2, 3, 10])
def test_every_ode_solver_lands_on_the_x0_that_a_network_insists_on(kind, steps):
    noise, x0 = latents(2, 3, 4, 4), latents(2, 3, 4, 4, seed=1)
    final = sample(kind, sd3_sigmas(steps, 3.0), noise, lambda x, sigma: (x - x0) / sigma)
    torch.testing.assert_close(final, x0, rtol=0, atol=1e-5)


def test_the_first_order_dpm_step_is_the_euler_step():
    x, v = latents(2, 3, 4, 4).double(), latents(2, 3, 4, 4, seed=1).double()
    first_order = dpm2_step(x, x - 0.7 * v, latents(2, 3, 4, 4, seed=2).double(), 1.0, 0.7, 0.5)
    torch.testing.assert_close(first_order, x + v * (0.5 - 0.7), rtol=1e-12, atol=1e-12)


def test_the_second_order_dpm_step_is_the_published_formula():
    x, m0, m1 = (latents(2, 3, seed=s).double() for s in range(3))
    s1, s0, st = 0.9, 0.7, 0.45
    lam = {s: math.log(1 - s) - math.log(s) for s in (s1, s0, st)}
    h, h0 = lam[st] - lam[s0], lam[s0] - lam[s1]
    d1 = (m0 - m1) / (h0 / h)
    expected = st / s0 * x - (1 - st) * (math.exp(-h) - 1) * m0 - 0.5 * (1 - st) * (math.exp(-h) - 1) * d1
    torch.testing.assert_close(dpm2_step(x, m0, m1, s1, s0, st), expected, rtol=1e-12, atol=1e-12)


@each("steps", [10, 25, 40])
def test_a_dpm_rollout_is_the_solver_written_in_numpy(steps):
    sigmas, noise = sd3_sigmas(steps, 3.0), np.linspace(-2, 2, 9)
    x, before = noise, None
    for k in range(steps):
        now, after = sigmas[k], sigmas[k + 1]
        clean = x - now * velocity(x, now)
        if k in (0, steps - 1):
            x = x + (after - now) * velocity(x, now)
        else:
            h = np.log((1 - after) / after) - np.log((1 - now) / now)
            last = np.inf if k == 1 else np.log((1 - now) / now) - np.log((1 - sigmas[k - 1]) / sigmas[k - 1])
            x = after / now * x - (1 - after) * (np.exp(-h) - 1) * (clean + 0.5 * h / last * (clean - before))
        before = clean
    found = sample("dpm2", sigmas, torch.from_numpy(noise)[:, None])
    np.testing.assert_allclose(found[:, 0].numpy(), x, rtol=0, atol=1e-7)


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


@each(("steps", "dpm", "euler"), [(16, 0.065, 0.169), (32, 0.0039, 0.088), (64, 0.0082, 0.045)])
def test_dpm_more_than_halves_eulers_error_from_16_steps_on(steps, dpm, euler):
    sigmas = shift_map(np.linspace(1, 0, steps + 1), 3.0)
    noise = torch.linspace(-2, 2, 81, dtype=torch.float64)[:, None]
    exact = MEAN + SPREAD * noise  # the flow of a Gaussian law is affine
    error = {kind: (sample(kind, sigmas, noise) - exact).abs().max().item() for kind in ("dpm2", "euler")}
    assert error["dpm2"] < error["euler"] / 2
    assert error["dpm2"] == pytest.approx(dpm, rel=0.02) and error["euler"] == pytest.approx(euler, rel=0.02)
