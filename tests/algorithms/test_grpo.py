import numpy as np
import pytest
import torch

from align_cluster.algorithms.grpo import GRPO
from align_cluster.rollouts.sampler import recorded_indices
from align_cluster.rollouts.windows import FractionWindow
from align_cluster.types import Prompt

from ..cases import each
from ..drawing import chunk_of

SEEDS = range(8)
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, 0.0, -2.0, 7.0])
TURNS = 4
NOISY = {
    "flow_sde": {"kind": "flow_sde"},
    "dance_sde": {"kind": "dance_sde"},
    "dance_sde truncated": {"kind": "dance_sde", "truncate_timesteps": True},
    "cps": {"kind": "cps"},
    "flow_ddim": {"kind": "flow_ddim"},
    "ddim epsilon": {"kind": "ddim", "prediction": "epsilon"},
    "ddim v": {"kind": "ddim", "prediction": "v"},
}
GAUSSIAN = sorted(set(NOISY) - {"cps"})  # kinds whose density is normalised


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
    return policy, policy.rollout(SEEDS, range(TURNS))


def own_steps() -> np.ndarray:
    """Four of the five steps that can be trained, in an order of its own for each sample, as a sampler chooses them."""
    window = FractionWindow(FractionWindow.Config(choice="per_sample", fraction=0.8)).plan(6, 0, 0)
    indices = recorded_indices(chunk_of(Prompt(0, ""), SEEDS), window)
    assert indices.shape == (len(SEEDS), TURNS) and len(np.unique(indices, axis=0)) == len(SEEDS)
    return indices


def draw(make_policy, name: str, per_sample: bool):
    """A policy of one kind away from its base, and its own rollout."""
    policy = make_policy(**NOISY[name], shift=2.0)  # steps of different lengths
    disturb(policy)
    return policy, policy.rollout(SEEDS, own_steps() if per_sample else range(TURNS))


def one_step(policy, rollout, row: int, inner_pass: int, adapter: str | None = "default"):
    """(mean [2, 1, 1] of one recorded step of one sample, and that step's entry of each table), without a batch."""
    k, table = int(rollout.indices[row, inner_pass]), policy.step.coefficients()
    x = rollout.path.before[row, inner_pass]
    output = policy.velocity(x[None], policy.step.fed(torch.tensor([k])), adapter)[0]
    entry = {name: float(values[k]) for name, values in vars(table).items()}
    return entry["x"] * x + entry["output"] * output, entry | {"dt": float(policy.sigmas[k + 1] - policy.sigmas[k])}


@each("per_sample", [False, True])
@each("name", NOISY)
def test_with_unchanged_weights_the_ratio_is_one(make_policy, name, per_sample):
    policy, rollout = draw(make_policy, name, per_sample)
    for inner_pass in range(TURNS):
        _, metrics = grpo().loss(policy, policy.batch(rollout, ADVANTAGES, inner_pass))
        assert (metrics["log_ratio"] == 0).all()  # to the bit, where 1e-6 would do
        assert metrics["clip_high"].sum() == metrics["clip_low"].sum() == 0
    disturb(policy)
    changed = [
        grpo().loss(policy, policy.batch(rollout, ADVANTAGES, inner_pass))[1]["log_ratio"]
        for inner_pass in range(TURNS)
    ]
    assert (torch.stack(changed).abs() > 1e-6).all()


@each("per_sample", [False, True])
@each("name", NOISY)
def test_the_gradient_at_ratio_one_is_that_of_advantage_weighted_log_probs(make_policy, name, per_sample):
    policy, rollout = draw(make_policy, name, per_sample)
    for inner_pass in range(TURNS):
        loss, _ = grpo().loss(policy, policy.batch(rollout, ADVANTAGES, inner_pass))
        expected = 0
        for row, advantage in enumerate(ADVANTAGES.clamp(-5, 5)):
            mean, table = one_step(policy, rollout, row, inner_pass)
            x_next = rollout.path.after[row, inner_pass]
            if name == "cps":
                log_prob = -((x_next - mean) ** 2).mean()
            else:
                log_prob = torch.distributions.Normal(mean, table["std"]).log_prob(x_next).mean()
            expected = expected - advantage * log_prob
        expected = gradient(expected, policy.parameters)
        assert expected.abs().max() > 1e-3
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradient(loss.sum(), policy.parameters), expected, rtol=1e-3, atol=1e-5 * scale)


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
    joint = sum(
        algorithm.loss(policy, policy.batch(rollout, ADVANTAGES, inner_pass))[0].sum() for inner_pass in range(TURNS)
    )
    expected = gradient(joint, policy.parameters)
    for inner_pass in range(TURNS):
        algorithm.loss(policy, policy.batch(rollout, ADVANTAGES, inner_pass))[0].sum().backward()
    accumulated = torch.cat([parameter.grad.flatten() for parameter in policy.parameters])
    torch.testing.assert_close(accumulated, expected, rtol=1e-5, atol=1e-7)


@each("mode", ["no_dt", "exact_mean", "exact_sum"])
@each("name", NOISY)
def test_kl_to_the_base_is_zero_without_gradient_while_the_adapter_is_zero(make_policy, name, mode):
    policy = make_policy(**NOISY[name])
    torch.nn.init.ones_(policy.adapters["old"].out.bias)  # an adapter that is not the base
    rollout = policy.rollout(SEEDS, own_steps())
    for inner_pass in range(TURNS):
        loss, metrics = grpo(kl_beta=3.0, kl_mode=mode).loss(policy, policy.batch(rollout, torch.zeros(8), inner_pass))
        assert (metrics["kl"] == 0).all() and (loss == 0).all()
        assert gradient(loss.sum(), policy.parameters).abs().max() == 0


@each("mode", ["no_dt", "exact_mean", "exact_sum"])
@each("name", NOISY)
def test_kl_of_samples_at_different_steps_is_that_of_each_ones_own_step(make_policy, name, mode):
    policy, rollout = draw(make_policy, name, per_sample=True)
    for inner_pass in range(TURNS):
        _, metrics = grpo(kl_beta=1.0, kl_mode=mode).loss(policy, policy.batch(rollout, ADVANTAGES, inner_pass))
        for row in range(8):
            mean, table = one_step(policy, rollout, row, inner_pass)
            reference, _ = one_step(policy, rollout, row, inner_pass, None)
            std = torch.as_tensor(table["std_t"] if mode == "no_dt" else table["std"]).double()
            normals = (torch.distributions.Normal(m.double(), std) for m in (mean, reference))
            exact = torch.distributions.kl_divergence(*normals)  # adds 1 and takes it off, which fp32 would round
            expected = exact.sum() if mode == "exact_sum" else exact.mean()
            assert metrics["kl"][row].item() == pytest.approx(expected.item(), rel=1e-3)


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


@each("weight", ["inverse_dt", "none"])
@each("name", GAUSSIAN)
def test_a_guarded_ratio_of_unchanged_weights_is_one_and_teaches_the_deviation_times_as_much(make_policy, name, weight):
    policy, rollout = draw(make_policy, name, per_sample=True)
    for inner_pass in range(TURNS):
        batch = policy.batch(rollout, ADVANTAGES, inner_pass)
        plain, _ = grpo().loss(policy, batch)
        guarded, metrics = grpo(ratio="guard", guard_weight=weight).loss(policy, batch)
        assert (metrics["log_ratio"] == 0).all() and metrics["clip_high"].sum() == metrics["clip_low"].sum() == 0
        for row in range(8):
            _, table = one_step(policy, rollout, row, inner_pass)
            share = 1 / -table["dt"] if weight == "inverse_dt" else 1.0
            assert guarded[row].item() == pytest.approx(-share * ADVANTAGES[row].clamp(-5, 5).item(), rel=1e-6)
            expected = table["std"] * share * gradient(plain[row], policy.parameters)
            found = gradient(guarded[row], policy.parameters)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@each("name", GAUSSIAN)
def test_a_guarded_ratio_of_changed_weights_is_the_shift_of_the_mean_along_the_noise(make_policy, name):
    policy, rollout = draw(make_policy, name, per_sample=True)
    old = [[one_step(policy, rollout, row, inner_pass)[0].detach() for row in range(8)] for inner_pass in range(TURNS)]
    disturb(policy, 0.05)
    algorithm = grpo(ratio="guard", guard_weight="none", clip=0.05, clip_high=0.02)
    for inner_pass in range(TURNS):
        loss, metrics = algorithm.loss(policy, policy.batch(rollout, ADVANTAGES, inner_pass))
        for row, advantage in enumerate(ADVANTAGES.clamp(-5, 5).tolist()):
            mean, table = one_step(policy, rollout, row, inner_pass)
            noise = (rollout.path.after[row, inner_pass] - old[inner_pass][row]) / table["std"]
            ratio = ((mean - old[inner_pass][row]) * noise).mean().exp().item()
            clipped = min(max(ratio, 0.95), 1.02)
            assert loss[row].item() == pytest.approx(max(-advantage * ratio, -advantage * clipped), rel=1e-4)
            assert metrics["clip_high"][row].item() == (ratio > 1.02)
            assert metrics["clip_low"][row].item() == (ratio < 0.95)


def test_records_in_shared_memory_are_read_only_and_that_warns_nobody(drawn, recwarn):
    policy, rollout = drawn
    policy.sigmas.flags.writeable = False
    torch.set_warn_always(True)
    try:
        grpo(ratio="guard").loss(policy, policy.batch(rollout, ADVANTAGES))
    finally:
        torch.set_warn_always(False)
    assert not recwarn.list


def test_only_a_guarded_ratio_asks_for_recorded_means():
    assert grpo(ratio="guard").needs_means and not grpo(ratio="plain").needs_means


def test_the_upper_clip_range_is_the_lower_one_unless_it_is_set(drawn):
    policy, rollout = drawn
    disturb(policy, 0.3)
    batch = policy.batch(rollout, ADVANTAGES, 1)
    losses = {high: grpo(clip=0.01, clip_high=high).loss(policy, batch) for high in (None, 0.01, 0.1)}
    assert torch.equal(losses[None][0], losses[0.01][0]) and not torch.equal(losses[None][0], losses[0.1][0])
    ratio = losses[0.1][1]["log_ratio"].exp()
    torch.testing.assert_close(losses[0.1][1]["clip_high"], (ratio > 1.1).float())
    torch.testing.assert_close(losses[0.1][1]["clip_low"], (ratio < 0.99).float())


def test_metrics_are_detached_and_one_a_sample(drawn):
    policy, rollout = drawn
    loss, metrics = grpo(kl_beta=0.1).loss(policy, policy.batch(rollout, ADVANTAGES))
    assert loss.shape == (8,) and loss.requires_grad
    assert set(metrics) == {"log_ratio", "clip_high", "clip_low", "kl"}
    assert all(value.shape == (8,) and not value.requires_grad for value in metrics.values())
