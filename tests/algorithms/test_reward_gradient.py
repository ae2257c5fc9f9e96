"""Direct-Align's recovery: exact with a perfect network, at any level and in both directions."""

import pytest
import torch

from align_cluster.algorithms.reward_gradient import recover
from align_cluster.backbones.noising import clean, noised, signal

from ..cases import each

PREDICTIONS = ("flow", "epsilon", "v")
LEVELS = (0.05, 0.3, 0.75, 0.9643, 0.99)
STEPS = [(s, s - gap) for s in LEVELS for gap in (0.02, -0.02, 0.0, 0.3, -0.3) if 0 <= s - gap <= 0.99]
SHAPE = (1, 4, 6, 6)


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def perfect(x0, noise, level, prediction):
    """What a network that knows everything outputs."""
    a = signal(level, prediction).view(-1, 1, 1, 1)
    return {"flow": noise - x0, "epsilon": noise, "v": a * noise - level.view(-1, 1, 1, 1) * x0}[prediction]


def one(value):
    return torch.tensor([value])


@each("prediction", PREDICTIONS)
@each(("level", "target"), STEPS)
def test_a_perfect_output_recovers_x0_at_every_level_in_both_directions(prediction, level, target):
    (x0, noise), level, target = data(), one(level), one(target)
    x, output = noised(x0, noise, level, prediction), perfect(x0, noise, level, prediction)
    found = recover(x, output, noise, level, target, prediction)
    torch.testing.assert_close(found, x0, rtol=0, atol=2e-4)
    torch.testing.assert_close(clean(x, output, level, prediction), x0, rtol=0, atol=2e-4)


@each(("level", "target", "factor"), [(0.9643, 0.9428, 0.376), (0.75, 0.73, 0.074)])
def test_an_error_of_the_velocity_grows_by_the_step_over_the_signal_at_the_target(level, target, factor):
    """S2, with the figures of algorithms.md."""
    (x0, noise), (error, _) = data(), data(1)
    x = noised(x0, noise, one(level), "flow")
    found = recover(x, noise - x0 + error, noise, one(level), one(target), "flow")
    torch.testing.assert_close((found - x0).norm() / error.norm(), torch.tensor((level - target) / (1 - target)))
    assert ((found - x0).norm() / error.norm()).item() == pytest.approx(factor, abs=2e-3)


def test_the_divisor_of_a_velocity_is_the_signal_after_the_step():
    """The trap: the paper's divisor, the signal before it, is off by a factor that no test on small steps would see."""
    x0, noise = data()
    level, target = one(0.9643), one(0.9428)
    x, v = noised(x0, noise, level, "flow"), noise - x0
    stepped = x + (target - level) * v - target * noise
    torch.testing.assert_close(stepped / (1 - target), x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(stepped / (1 - level), x0 * (1 - target) / (1 - level), rtol=0, atol=1e-4)
    assert (stepped / (1 - level) - x0).abs().max() > 0.5 * x0.abs().max()


def test_epsilon_is_recovered_as_printed():
    """Eq. 5: x0 = (x_t - d eps_theta - (s_t - d) eps) / a_t."""
    (x0, noise), (output, _) = data(), data(1)
    level, target = one(0.9), one(0.85)
    x, kept = noised(x0, noise, level, "epsilon"), (1 - 0.9**2) ** 0.5
    printed = (x - 0.05 * output - (0.9 - 0.05) * noise) / kept
    torch.testing.assert_close(recover(x, output, noise, level, target, "epsilon"), printed)


@each("prediction", PREDICTIONS)
def test_an_output_of_another_kind_recovers_the_same(prediction):
    """An epsilon network's wrong answer, said as v, is as wrong."""
    (x0, noise), (error, _) = data(), data(1)
    level, target = one(0.8), one(0.7)
    x, a = noised(x0, noise, level, "epsilon"), 0.6
    eps = noise + error
    v = (eps - 0.8 * x) / a  # of x_t = a x0 + s eps, v = a eps - s x0
    torch.testing.assert_close(
        recover(x, v, noise, level, target, "v"), recover(x, eps, noise, level, target, "epsilon"), rtol=0, atol=1e-5
    )


def test_gradients_come_through_the_output_alone():
    """S3: d x0 / d v is -(sA - s*) / (1 - s*) where the step denoises and (s* - sB) / (1 - s*) where it inverts."""
    (x0, noise), target = data(), one(0.9)
    for level in (0.92, 0.88):
        leaf = torch.zeros(SHAPE, requires_grad=True)
        recover(noised(x0, noise, one(level), "flow"), leaf, noise, one(level), target, "flow").sum().backward()
        torch.testing.assert_close(leaf.grad, torch.full(SHAPE, -(level - 0.9) / (1 - 0.9)), rtol=1e-4, atol=1e-6)


def test_noise_that_was_rounded_is_not_the_noise_that_was_injected():
    """Why all of it is fp32: subtracting a bf16 copy at a high level costs a visible part of a latent unit."""
    x0, noise = data()
    level, target = one(0.9643), one(0.9428)
    x, v = noised(x0, noise, level, "flow"), noise - x0
    exact = recover(x, v, noise, level, target, "flow")
    rounded = recover(x.bfloat16().float(), v, noise, level, target, "flow")
    assert (exact - x0).abs().max() < 1e-4 and (rounded - x0).abs().max() > 0.02
