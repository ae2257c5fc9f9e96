import numpy as np
import pytest
import torch

from align_cluster.backbones.levels import ddim_levels, sd3_sigmas
from align_cluster.rollouts.denoise import Path, denoise, initial_noise
from align_cluster.rollouts.steps import STEPS
from align_cluster.streams import stream

SHAPE = (4, 3, 5)


def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A field without structure, computed sample by sample."""
    return torch.tanh(3 * x) - 0.3 * x.roll(1, dims=1) + sigma.view(-1, 1, 1, 1)


def draw(kind: str, seeds: tuple[int, ...], steps: int = 8, indices: tuple[int, ...] = ()) -> Path:
    prediction = STEPS[kind].predictions[0]
    sigmas = sd3_sigmas(steps, 3.0) if prediction == "flow" else ddim_levels(steps)
    own = np.tile(np.array(indices, dtype=np.int64), (len(seeds), 1))
    return denoise(velocity, STEPS[kind](STEPS[kind].Config(), sigmas, prediction), SHAPE, seeds, indices=own)


def test_initial_noise_is_that_of_each_samples_own_generator():
    noise = initial_noise([torch.Generator().manual_seed(seed) for seed in (5, 2**63 - 1)], SHAPE)
    assert torch.equal(noise[0], torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(noise[1], torch.randn(SHAPE, generator=torch.Generator().manual_seed(2**63 - 1)))


@pytest.mark.parametrize("kind", sorted(STEPS))
def test_a_sample_depends_on_its_own_seed_only(kind):
    first, second = draw(kind, (1, 7, 3)), draw(kind, (9, 7, 4))
    assert torch.equal(first.x0[1], second.x0[1])
    assert not torch.allclose(first.x0[0], second.x0[0]) and not torch.allclose(first.x0[2], second.x0[2])


def test_global_random_state_neither_matters_nor_moves():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = draw("flow_sde", (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(draw("flow_sde", (1, 2)).x0, first.x0)


def test_recording_some_steps_gives_the_rows_of_a_full_record():
    full, part = draw("flow_sde", (1, 2), indices=tuple(range(8))), draw("flow_sde", (1, 2), indices=(1, 4, 5))
    assert part.before.shape == part.after.shape == (2, 3, *SHAPE) and part.log_probs.shape == (2, 3)
    assert torch.equal(part.x0, full.x0)
    for name in ("before", "after", "log_probs"):
        assert torch.equal(getattr(part, name), getattr(full, name)[:, [1, 4, 5]])


def test_a_full_record_is_one_unbroken_path_from_noise_to_the_final_latents():
    path = draw("flow_sde", (1, 2), indices=tuple(range(8)))
    noise = initial_noise([stream(seed) for seed in (1, 2)], SHAPE)
    assert torch.equal(path.before[:, 0], noise) and torch.equal(path.after[:, -1], path.x0)
    assert torch.equal(path.after[:, :-1], path.before[:, 1:])


def test_recorded_log_densities_are_recomputed_bitwise_from_the_record():
    path, sigmas = draw("flow_sde", (1, 2), indices=(0, 3)), sd3_sigmas(8, 3.0)
    step = STEPS["flow_sde"](STEPS["flow_sde"].Config(), sigmas)
    for column, k in enumerate((0, 3)):
        x, x_next = path.before[:, column], path.after[:, column]
        again = step.log_prob(torch.full((2,), k), x, velocity(x, torch.full((2,), float(sigmas[k]))), x_next)
        assert torch.equal(path.log_probs[:, column], again)


def test_recording_changes_no_sample_and_an_ode_records_nothing():
    assert torch.equal(draw("flow_sde", (1, 2)).x0, draw("flow_sde", (1, 2), indices=(2,)).x0)
    path = draw("dpm2", (1, 2))
    assert path.before is None and path.after is None and path.log_probs is None


def test_the_network_sees_the_level_of_each_step_in_fp32_and_no_graph_is_kept():
    seen, weight = [], torch.ones((), requires_grad=True)

    def field(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(sigma)
        return weight * x

    sigmas = sd3_sigmas(4, 3.0)
    step = STEPS["flow_sde"](STEPS["flow_sde"].Config(), sigmas)
    path = denoise(field, step, SHAPE, (1, 2), indices=np.array([[0, 2], [1, 2]]))
    assert all(sigma.shape == (2,) and sigma.dtype == torch.float32 for sigma in seen)
    np.testing.assert_array_equal([sigma[0].item() for sigma in seen], sigmas[:-1].astype(np.float32))
    assert not path.x0.requires_grad and not path.log_probs.requires_grad
