import math

import numpy as np
import pytest
import torch

from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.sd3 import SD3
from align_cluster.learner.fisher import FisherProbe, fisher_product, probing

SAMPLES, DIMS = 5, 4


class Toy(torch.nn.Module):
    """Twenty-two parameters, two of which the mean does not depend on; every sample has its own deviation."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        shapes = {"inner": (3, 4), "unused": (2,), "outer": (2, DIMS)}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.randn(shape, generator=g)))
        self.x = torch.randn(SAMPLES, 3, generator=g)
        self.std = torch.rand(SAMPLES, generator=g) + 0.2
        self.after = torch.randn(SAMPLES, 2, DIMS // 2, generator=g)

    def forward(self, inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.x @ inner)
        gated = hidden[:, :2] * hidden[:, 2:].sin()
        return (gated @ outer).view(SAMPLES, 2, DIMS // 2)

    def mean(self) -> torch.Tensor:
        return self(self.inner, self.outer)

    def log_prob(self) -> torch.Tensor:
        std = self.std.view(-1, 1, 1)
        return (-((self.after - self.mean()) ** 2) / (2 * std**2) - std.log()).flatten(1).mean(1)


@pytest.fixture
def toy() -> Toy:
    return Toy()


def explicit_fisher(toy: Toy) -> np.ndarray:
    """Mean over samples of J^T J / (s^2 D) from whole Jacobians, fp64 [22, 22]."""
    inner, outer = torch.autograd.functional.jacobian(toy, (toy.inner, toy.outer))
    blocks = [inner.reshape(SAMPLES, DIMS, -1), torch.zeros(SAMPLES, DIMS, 2), outer.reshape(SAMPLES, DIMS, -1)]
    jacobians = torch.cat(blocks, -1).double().numpy()
    return sum(j.T @ j / float(s) ** 2 / DIMS for j, s in zip(jacobians, toy.std, strict=True)) / SAMPLES


def estimate(probe: FisherProbe, toy: Toy, iterations: int) -> float:
    return probe.estimate(toy.mean(), toy.std, toy.log_prob(), iterations).lambda_max


def test_a_product_is_that_of_the_explicit_matrix(toy):
    product = fisher_product(toy.mean(), toy.std, list(toy.parameters()))
    matrix = explicit_fisher(toy)
    for seed in range(5):
        vector = torch.randn(22, generator=torch.Generator().manual_seed(seed))
        np.testing.assert_allclose(product(vector).detach(), matrix @ vector.double().numpy(), rtol=1e-4, atol=1e-5)


def test_products_are_symmetric_and_never_negative(toy):
    product = fisher_product(toy.mean(), toy.std, list(toy.parameters()))
    a, b = torch.randn(2, 22, generator=torch.Generator().manual_seed(0))
    assert float(a @ product(b)) == pytest.approx(float(b @ product(a)), rel=1e-4)
    assert float(a @ product(a)) > 0


def test_the_largest_eigenvalue_is_that_of_the_explicit_matrix(toy):
    expected = np.linalg.eigvalsh(explicit_fisher(toy))[-1]
    probe = FisherProbe(list(toy.parameters()), seed=0)
    assert estimate(probe, toy, 60) == pytest.approx(expected, rel=1e-3)
    assert float(probe.vector.norm()) == pytest.approx(1)


def test_an_estimate_never_exceeds_the_eigenvalue_and_rises_with_the_iterations(toy):
    expected = np.linalg.eigvalsh(explicit_fisher(toy))[-1]
    values = [estimate(FisherProbe(list(toy.parameters()), seed=0), toy, count) for count in (1, 2, 4, 8)]
    assert values == sorted(set(values)) and values[0] < 0.9 * expected and values[-1] <= expected * (1 + 1e-5)


def test_the_next_estimate_starts_from_the_last_eigenvector(toy):
    expected = np.linalg.eigvalsh(explicit_fisher(toy))[-1]
    cold = expected - estimate(FisherProbe(list(toy.parameters()), seed=0), toy, 2)
    probe = FisherProbe(list(toy.parameters()), seed=0)
    first = expected - estimate(probe, toy, 20)
    second = expected - estimate(probe, toy, 2)
    assert second <= first + 1e-5 * expected and second < 0.01 * cold


def test_the_score_norm_is_the_largest_of_a_loop_over_samples(toy):
    norms = []
    for index in range(SAMPLES):
        toy.zero_grad()
        toy.log_prob()[index].backward()
        norms.append(math.hypot(*(float(p.grad.norm()) for p in toy.parameters() if p.grad is not None)))
    score_norm = FisherProbe(list(toy.parameters()), 0).estimate(toy.mean(), toy.std, toy.log_prob()).score_norm
    assert score_norm == pytest.approx(max(norms), rel=1e-5) and max(norms) > 1.1 * min(norms)


def test_a_mean_that_does_not_move_has_no_curvature_and_leaves_the_start_random(toy):
    with torch.no_grad():
        toy.outer.zero_()
    probe = FisherProbe([toy.inner], seed=0)
    start = probe.vector.clone()
    found = probe.estimate(toy.mean(), toy.std, toy.log_prob())
    assert (found.lambda_max, found.score_norm) == (0, 0)
    assert torch.equal(probe.vector, start)


def test_a_mean_that_is_not_finite_does_not_spoil_later_estimates(toy):
    probe = FisherProbe(list(toy.parameters()), seed=0)
    assert not math.isfinite(probe.estimate(toy.mean() * math.nan, toy.std, toy.log_prob()).lambda_max)
    assert torch.isfinite(probe.vector).all()


def test_every_product_is_averaged_over_ranks(toy):
    parameters, std = list(toy.parameters()), toy.std[:2]
    halves = [toy.mean()[:2], toy.mean()[2:4]]
    both = FisherProbe(parameters, 0).estimate(torch.cat(halves), std.repeat(2), toy.log_prob()[:4], 6)
    here, there = FisherProbe(parameters, 0), fisher_product(halves[1], std, parameters)
    split = here.estimate(halves[0], std, toy.log_prob()[:2], 6, lambda flat: (flat + there(here.vector)) / 2)
    assert split.lambda_max == pytest.approx(both.lambda_max, rel=1e-5)


def test_a_seed_names_the_start_and_gradients_stay_as_they_were(toy):
    parameters = list(toy.parameters())
    toy.inner.grad = torch.ones_like(toy.inner)
    probe, twin = FisherProbe(parameters, 7), FisherProbe(parameters, 7)
    assert torch.equal(probe.vector, twin.vector) and not torch.equal(probe.vector, FisherProbe(parameters, 8).vector)
    estimate(probe, toy, 2)
    assert torch.equal(toy.inner.grad, torch.ones_like(toy.inner)) and toy.outer.grad is None


def test_a_product_on_the_embedded_network_is_that_of_finite_differences(settings):
    backbone = SD3(settings)
    denoiser = add_adapters(backbone, backbone.load_denoiser(), ["default"])
    parameters = list(adapter_parameters(denoiser, "default").values())
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=g))
    width, pooled_width = denoiser.config.joint_attention_dim, denoiser.config.pooled_projection_dim
    x, sequence = torch.randn(2, *backbone.latent_shape, generator=g), torch.randn(2, 7, width, generator=g)
    pooled, std = torch.randn(2, pooled_width, generator=g), torch.tensor([0.4, 0.7])

    def mean() -> torch.Tensor:
        v = backbone.velocity(denoiser, x, torch.tensor([0.9, 0.6]), sequence, pooled)
        return 0.9 * x - 0.5 * v

    vector = torch.randn(sum(p.numel() for p in parameters), generator=g)
    vector /= vector.norm()
    with probing():
        found = fisher_product(mean(), std, parameters)(vector)

    flat, far = torch.nn.utils.parameters_to_vector(parameters).detach(), []
    for step in (0.1, -0.1):
        torch.nn.utils.vector_to_parameters(flat + step * vector, parameters)
        far.append(mean().detach())
    torch.nn.utils.vector_to_parameters(flat, parameters)
    pushed = (far[0] - far[1]) / 0.2 / (std**2).view(-1, 1, 1, 1) / (2 * math.prod(backbone.latent_shape))
    (mean() * pushed).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in parameters])
    assert float((found - expected).norm()) < 1e-2 * float(expected.norm())
