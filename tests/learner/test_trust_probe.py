from types import SimpleNamespace

import numpy as np
import pytest
import torch

from align_cluster.backbones.levels import sd3_sigmas
from align_cluster.learner.trust_probe import TrustProbe
from align_cluster.rollouts.steps import FlowSde

SHAPE = (2, 3, 3)


class Linear(torch.nn.Module):
    """A policy whose velocity is a matrix times the latent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = torch.nn.Parameter(torch.randn(18, 18) / 4)
        self.step = FlowSde(FlowSde.Config(), sd3_sigmas(6, 3.0))

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, adapter: str | None = "default") -> torch.Tensor:
        return (x.flatten(1) @ self.matrix.T).view_as(x) * sigma.view(-1, 1, 1, 1)


@pytest.fixture
def drawn() -> tuple[Linear, SimpleNamespace]:
    """A policy and what a sampler would record of five members, each with its own two steps."""
    policy, generator = Linear(), torch.Generator().manual_seed(1)
    indices = torch.tensor([[0, 3], [1, 2], [4, 0], [2, 1], [3, 4]])
    before, noise = (torch.randn(5, 2, *SHAPE, generator=generator) for _ in range(2))
    after = torch.empty_like(before)
    for inner_pass in range(2):
        k, x = indices[:, inner_pass], before[:, inner_pass]
        mean, std, _ = policy.step.mean(k, x, policy.velocity(x, policy.step.fed(k)))
        after[:, inner_pass] = (mean + std.view(-1, 1, 1, 1) * noise[:, inner_pass]).detach()
    record = SimpleNamespace(indices=indices.numpy(), before=before.numpy(), after=after.numpy())
    return policy, record


@pytest.mark.parametrize("inner_pass", [0, 1])
def test_an_update_is_measured_on_the_chosen_members_at_their_own_steps(drawn, inner_pass):
    policy, record = drawn
    probe, change = TrustProbe([policy.matrix], 0, 1), 0.05 * torch.randn(18, 18)
    k, x = torch.from_numpy(record.indices[1:4, inner_pass]), torch.from_numpy(record.before[1:4, inner_pass])

    def laws() -> torch.distributions.Normal:
        mean, std, _ = policy.step.mean(k, x, policy.velocity(x, policy.step.fed(k)))
        return torch.distributions.Normal(mean.detach().double(), std.double().view(-1, 1, 1, 1))

    start = laws()
    probe.begin(policy, record, slice(1, 4), inner_pass)
    with torch.no_grad():
        policy.matrix += change
    found = probe.finish(0.25)
    expected = torch.distributions.kl_divergence(laws(), start).mean().item()
    assert found["step_kl"] == pytest.approx(expected, rel=1e-4)
    assert found["step_norm"] == pytest.approx(change.norm().item(), rel=1e-5) and found["gradient_norm"] == 0.25
    assert 0 < found["step_kl"] <= 0.5 * found["step_norm"] ** 2 * largest_eigenvalue(policy, k, x) * (1 + 1e-4)


def largest_eigenvalue(policy: Linear, k: torch.Tensor, x: torch.Tensor) -> float:
    """Of the explicit Fisher matrix a latent dimension."""
    fisher = np.zeros((324, 324))
    for i in range(len(x)):

        def mean(matrix: torch.Tensor, i: int = i) -> torch.Tensor:
            v = (x[i].flatten() @ matrix.T).view_as(x[i])[None] * policy.step.fed(k[i : i + 1]).view(-1, 1, 1, 1)
            return policy.step.mean(k[i : i + 1], x[i : i + 1], v)[0].flatten()

        jacobian = torch.autograd.functional.jacobian(mean, policy.matrix.detach()).reshape(18, -1).double().numpy()
        std = policy.step.mean(k[i : i + 1], x[i : i + 1], x[i : i + 1])[1].item()
        fisher += jacobian.T @ jacobian / std**2 / 18 / len(x)
    return float(np.linalg.eigvalsh(fisher)[-1])


def test_the_estimate_is_that_of_the_weights_before_the_update(drawn):
    policy, record = drawn
    probe = TrustProbe([policy.matrix], 0, 1)
    for _ in range(12):  # warm starts converge
        probe.begin(policy, record, slice(0, 5), 0)
    before = probe.estimate
    with torch.no_grad():
        policy.matrix *= 5
    found = probe.finish(1.0)
    k, x = torch.from_numpy(record.indices[:, 0]), torch.from_numpy(record.before[:, 0])
    assert found["lambda_max"] == before.lambda_max == pytest.approx(largest_eigenvalue(policy, k, x), rel=1e-2)
    assert found["score_norm"] == before.score_norm > 0


def test_an_update_that_changes_nothing_has_length_and_kl_zero(drawn):
    policy, record = drawn
    probe = TrustProbe([policy.matrix], 0, 1)
    probe.begin(policy, record, slice(0, 2), 1)
    found = probe.finish(0.0)
    assert found["step_norm"] == found["step_kl"] == 0
