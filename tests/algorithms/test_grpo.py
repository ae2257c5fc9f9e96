import pytest
import torch

from align_cluster.algorithms.grpo import GRPO

SEEDS = range(8)
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, 0.0, -2.0, 7.0])


def grpo(**settings) -> GRPO:
    return GRPO(GRPO.Config(**({"kl_beta": 0.0} | settings)))


def gradient(loss: torch.Tensor, parameters: list) -> torch.Tensor:
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    pairs = zip(grads, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


def disturb(policy, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def drawn(make_policy):
    """A policy away from its base, and its own rollout with the first four of six steps recorded."""
    policy = make_policy()
    disturb(policy)
    return policy, policy.rollout(SEEDS, (0, 1, 2, 3))


def test_with_unchanged_weights_the_ratio_is_one(drawn):
    policy, rollout = drawn
    for turn in range(4):
        _, metrics = grpo().loss(policy, policy.batch(rollout, ADVANTAGES, turn))
        assert metrics["log_ratio"].abs().max() < 1e-6
        assert metrics["clip_high"].sum() == metrics["clip_low"].sum() == 0


def test_the_gradient_at_ratio_one_is_that_of_advantage_weighted_log_probs(drawn):
    policy, rollout = drawn
    for turn in range(4):
        loss, _ = grpo().loss(policy, policy.batch(rollout, ADVANTAGES, turn))
        x, x_next = rollout.path.before[:, turn], rollout.path.after[:, turn]
        v = policy.velocity(x, torch.full((8,), float(policy.sigmas[turn])))
        mean, std, _ = policy.step.mean(torch.full((8,), turn), x, v)
        log_prob = torch.distributions.Normal(mean, std.view(-1, 1, 1, 1)).log_prob(x_next).flatten(1).mean(1)
        expected = gradient(-(ADVANTAGES.clamp(-5, 5) * log_prob).sum(), policy.parameters)
        torch.testing.assert_close(gradient(loss.sum(), policy.parameters), expected, rtol=1e-4, atol=1e-6)


def test_advantages_are_clipped(drawn):
    policy, rollout = drawn
    loss, _ = grpo(advantage_clip=1.5).loss(policy, policy.batch(rollout, ADVANTAGES))
    torch.testing.assert_close(loss, -ADVANTAGES.clamp(-1.5, 1.5), rtol=1e-5, atol=1e-6)


def test_after_an_update_clipped_samples_teach_nothing_and_are_counted(drawn):
    policy, rollout = drawn
    disturb(policy, 0.3)
    algorithm = grpo(clip=0.01)
    loss, metrics = algorithm.loss(policy, policy.batch(rollout, ADVANTAGES, 1))
    ratio = metrics["log_ratio"].exp()
    torch.testing.assert_close(metrics["clip_high"], (ratio > 1.01).float())
    torch.testing.assert_close(metrics["clip_low"], (ratio < 0.99).float())
    stopped = ((ADVANTAGES > 0) & (ratio > 1.01)) | ((ADVANTAGES < 0) & (ratio < 0.99)) | (ADVANTAGES == 0)
    assert 1 < stopped.sum() < 8
    for i in range(8):
        assert (gradient(loss[i], policy.parameters).abs().max() == 0) == stopped[i]


def test_no_advantage_and_no_kl_is_no_gradient(drawn):
    policy, rollout = drawn
    loss, _ = grpo().loss(policy, policy.batch(rollout, torch.zeros(8)))
    assert gradient(loss.sum(), policy.parameters).abs().max() == 0


def test_gradients_accumulated_over_steps_are_those_of_the_joint_loss(drawn):
    policy, rollout = drawn
    algorithm = grpo(kl_beta=0.1)
    joint = sum(algorithm.loss(policy, policy.batch(rollout, ADVANTAGES, turn))[0].sum() for turn in range(4))
    expected = gradient(joint, policy.parameters)
    for turn in range(4):
        algorithm.loss(policy, policy.batch(rollout, ADVANTAGES, turn))[0].sum().backward()
    accumulated = torch.cat([parameter.grad.flatten() for parameter in policy.parameters])
    torch.testing.assert_close(accumulated, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["no_dt", "exact_mean", "exact_sum"])
def test_kl_to_the_base_is_zero_without_gradient_while_the_adapter_is_zero(make_policy, mode):
    policy = make_policy()
    torch.nn.init.ones_(policy.adapters["old"].out.bias)  # an adapter that is not the base
    rollout = policy.rollout(SEEDS, (0, 1))
    loss, metrics = grpo(kl_beta=3.0, kl_mode=mode).loss(policy, policy.batch(rollout, torch.zeros(8)))
    assert (metrics["kl"] == 0).all() and (loss == 0).all()
    assert gradient(loss.sum(), policy.parameters).abs().max() == 0


def test_kl_pulls_a_changed_policy_back_and_the_base_carries_no_gradient(drawn):
    policy, rollout = drawn
    algorithm = grpo(kl_beta=2.0)
    loss, metrics = algorithm.loss(policy, policy.batch(rollout, torch.zeros(8), 1))
    assert (metrics["kl"] > 0).all()
    torch.testing.assert_close(loss, 2.0 * metrics["kl"])
    direction = gradient(loss.sum(), policy.parameters)
    with torch.no_grad():
        start = 0
        for parameter in policy.parameters:
            count = parameter.numel()
            parameter -= 1e-3 * direction[start : start + count].view_as(parameter)
            start += count
    assert algorithm.loss(policy, policy.batch(rollout, torch.zeros(8), 1))[1]["kl"].sum() < metrics["kl"].sum()


def test_metrics_are_detached_and_one_a_sample(drawn):
    policy, rollout = drawn
    loss, metrics = grpo(kl_beta=0.1).loss(policy, policy.batch(rollout, ADVANTAGES))
    assert loss.shape == (8,) and loss.requires_grad
    assert set(metrics) == {"log_ratio", "clip_high", "clip_low", "kl"}
    assert all(value.shape == (8,) and not value.requires_grad for value in metrics.values())
