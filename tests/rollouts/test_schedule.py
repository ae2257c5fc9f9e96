import json

import numpy as np
import pytest

from align_cluster.embedded import pipeline_path
from align_cluster.rollouts.schedule import sd3_sigmas, shift_map

STEPS = (1, 2, 6, 10, 28, 40)


def test_the_tables_of_sd35_medium_are_golden():
    ten = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    six = [1, 0.9233, 0.8189, 0.6683, 0.4322, 0.0089, 0]
    np.testing.assert_allclose(sd3_sigmas(10, 3.0), ten, atol=5e-5)
    np.testing.assert_allclose(sd3_sigmas(6, 3.0), six, atol=5e-5)


def test_shift_one_leaves_levels_equally_spaced():
    np.testing.assert_allclose(sd3_sigmas(4, 1.0), [1, 0.667, 0.334, 0.001, 0], atol=1e-12)


@pytest.mark.parametrize("shift", [0.05, 0.17, 0.5, 1.0, 1.15, 3.0, 7.3, 12.0])
@pytest.mark.parametrize("steps", STEPS)
def test_every_table_falls_strictly_from_exactly_one_to_exactly_zero(steps, shift):
    sigmas = sd3_sigmas(steps, shift)
    assert len(sigmas) == steps + 1 and sigmas.dtype == np.float64
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.15, 3.0, 6.0])
@pytest.mark.parametrize("steps", STEPS)
def test_levels_are_those_of_the_diffusers_scheduler(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(sd3_sigmas(steps, shift), scheduler.sigmas.numpy(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("steps", STEPS)
def test_the_embedded_pipeline_draws_with_its_own_scheduler_levels(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = json.loads((pipeline_path() / "scheduler" / "scheduler_config.json").read_text())
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(sd3_sigmas(steps, config["shift"]), scheduler.sigmas.numpy(), rtol=2e-6, atol=1e-7)


def test_shifts_compose_by_multiplication():
    levels = np.linspace(0, 1, 11)
    np.testing.assert_allclose(shift_map(shift_map(levels, 2.0), 1.5), shift_map(levels, 3.0), rtol=1e-14)
