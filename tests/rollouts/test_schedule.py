import json

import numpy as np
import pytest

from align_cluster.backbones.levels import (
    ddim_levels,
    ddim_timesteps,
    flux_sigmas,
    linear_sigmas,
    sd3_sigmas,
    shift_map,
)
from align_cluster.embedded import pipeline_path
from align_cluster.errors import UserError
from align_cluster.rollouts.schedule import SCHEDULES

from ..cases import each

STEPS = (1, 2, 6, 10, 28, 40)


def test_the_tables_of_sd35_medium_are_golden():
    ten = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    six = [1, 0.9233, 0.8189, 0.6683, 0.4322, 0.0089, 0]
    np.testing.assert_allclose(sd3_sigmas(10, 3.0), ten, atol=5e-5)
    np.testing.assert_allclose(sd3_sigmas(6, 3.0), six, atol=5e-5)


def test_the_table_of_flux_at_512_pixels_is_golden():
    np.testing.assert_allclose(flux_sigmas(6, 1024), [1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0], atol=5e-5)


def test_the_tables_of_dancegrpo_and_srpo_are_golden():
    first, second = [1, 0.9783, 0.9545, 0.9286, 0.9, 0.8684, 0.8333, 0.7941, 0.75], [0.7, 0.6429, 0.5769, 0.5, 0.4091]
    np.testing.assert_allclose(linear_sigmas(16, 3.0), [*first, *second, 0.3, 0.1667, 0], atol=5e-5)
    np.testing.assert_allclose(linear_sigmas(50, 3.0)[[5, 25, 30]], [0.9643, 0.75, 0.6667], atol=5e-5)


def test_dancegrpos_levels_are_its_formula_at_every_number_of_steps():
    for steps in range(2, 101):
        even = 1 - np.arange(steps + 1) / steps
        np.testing.assert_allclose(linear_sigmas(steps, 3.0), 3 * even / (1 + 2 * even), rtol=0, atol=1e-15)


def test_the_levels_of_stable_diffusion_are_golden():
    timesteps = ddim_timesteps(50)
    assert timesteps.tolist() == list(range(981, 0, -20)) and timesteps.dtype == np.int64
    alpha_bar = dict(zip(ddim_timesteps(999).tolist(), 1 - ddim_levels(999)[:-1] ** 2, strict=True))
    assert alpha_bar[500] == pytest.approx(0.27633, abs=5e-6) and alpha_bar[999] == pytest.approx(0.00466, abs=5e-6)
    assert 1 - ddim_levels(50)[-1] ** 2 == pytest.approx(0.99915, abs=5e-6)


def test_shift_one_leaves_levels_equally_spaced():
    np.testing.assert_allclose(sd3_sigmas(4, 1.0), [1, 0.667, 0.334, 0.001, 0], atol=1e-12)
    np.testing.assert_allclose(linear_sigmas(4, 1.0), [1, 0.75, 0.5, 0.25, 0], atol=1e-12)
    np.testing.assert_allclose(flux_sigmas(4, 256, base_shift=0.0), [1, 0.75, 0.5, 0.25, 0], atol=1e-12)


@each("shift", [0.05, 0.17, 0.5, 1.0, 1.15, 3.0, 7.3, 12.0])
@each("steps", STEPS)
def test_every_flow_table_falls_strictly_from_exactly_one_to_exactly_zero(steps, shift):
    for sigmas in (sd3_sigmas(steps, shift), linear_sigmas(steps, shift), flux_sigmas(steps, 1024, shift, shift)):
        assert len(sigmas) == steps + 1 and sigmas.dtype == np.float64
        assert sigmas[0] == 1 and sigmas[-1] == 0 and (np.diff(sigmas) < 0).all()


@each("steps", [*STEPS, 50, 501, 999])
def test_ddim_levels_fall_strictly_and_keep_signal_at_the_start_and_noise_at_the_end(steps):
    levels = ddim_levels(steps)
    assert len(levels) == steps + 1 and levels.dtype == np.float64
    assert levels[-1] > 0 and levels[0] < 1 and (np.diff(levels) < 0).all()


def test_more_steps_than_noise_levels_are_refused():
    with pytest.raises(UserError, match="1000 denoising steps do not fit .* at most 999"):
        ddim_levels(1000)


@each("shift", [0.5, 1.0, 1.15, 3.0, 6.0])
@each("steps", STEPS)
def test_levels_are_those_of_the_diffusers_scheduler(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(sd3_sigmas(steps, shift), scheduler.sigmas.numpy(), rtol=2e-6, atol=1e-7)


@each("steps", STEPS)
def test_the_embedded_pipeline_draws_with_its_own_scheduler_levels(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = json.loads((pipeline_path() / "scheduler" / "scheduler_config.json").read_text())
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(sd3_sigmas(steps, config["shift"]), scheduler.sigmas.numpy(), rtol=2e-6, atol=1e-7)


def test_shifts_compose_by_multiplication():
    levels = np.linspace(0, 1, 11)
    np.testing.assert_allclose(shift_map(shift_map(levels, 2.0), 1.5), shift_map(levels, 3.0), rtol=1e-14)


@each("tokens", [256, 1024, 2025, 4096])
@each("steps", STEPS)
def test_flux_levels_are_those_of_the_flux_pipelines_scheduler(steps, tokens):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens))
    np.testing.assert_allclose(flux_sigmas(steps, tokens), scheduler.sigmas.numpy(), rtol=2e-6, atol=1e-7)


@each("steps", [1, 7, 10, 28, 50])
def test_ddim_timesteps_and_levels_are_those_of_the_diffusers_scheduler(steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False
    )
    scheduler.set_timesteps(steps)
    assert ddim_timesteps(steps).tolist() == scheduler.timesteps.tolist()
    alpha_bar = [*scheduler.alphas_cumprod[scheduler.timesteps].tolist(), scheduler.final_alpha_cumprod.item()]
    np.testing.assert_allclose(1 - ddim_levels(steps) ** 2, alpha_bar, rtol=2e-5)


def test_a_choice_of_schedule_gives_that_schedules_levels():
    def native(steps: int) -> np.ndarray:
        return np.linspace(1, 0, steps + 1) ** 2

    def chosen(kind: str, **settings) -> np.ndarray:
        return SCHEDULES[kind](SCHEDULES[kind].Config(**settings)).sigmas(6, native, 1024)

    assert np.array_equal(chosen("native"), native(6))
    assert np.array_equal(chosen("sd3"), sd3_sigmas(6, 3.0))
    assert np.array_equal(chosen("sd3", shift=1.5), sd3_sigmas(6, 1.5))
    assert np.array_equal(chosen("linear"), linear_sigmas(6, 3.0))
    assert np.array_equal(chosen("linear", shift=5.0), linear_sigmas(6, 5.0))
    assert np.array_equal(chosen("flux"), flux_sigmas(6, 1024))
    assert np.array_equal(chosen("flux", base_shift=0.3, max_shift=0.9), flux_sigmas(6, 1024, 0.3, 0.9))
    assert {kind: schedule.Config().kind for kind, schedule in SCHEDULES.items()} == {kind: kind for kind in SCHEDULES}
