import numpy as np
import pytest
import torch

from align_cluster.algorithms.nft import NFT

SEEDS = range(6)
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, -2.0])


def nft(**settings) -> NFT:
    return NFT(NFT.Config(**({"kl_beta": 0.0} | settings)))


@pytest.fixture
def policy(make_policy):
    return make_policy("dpm2")


def levels_seen(policy, batch) -> torch.Tensor:
    """Noise levels [B] that a loss evaluated the default adapter at."""
    seen = []
    velocity = policy.velocity
    policy.velocity = lambda x, sigma, adapter="default": seen.append((sigma, x)) or velocity(x, sigma, adapter)
    nft().loss(policy, batch)
    policy.velocity = velocity
    return seen


@pytest.mark.parametrize(
    ("old", "golden"), [("slow", (0, 0.075, 0.1, 0.5, 0.5)), ("late", (0, 0, 0.1875, 0.999, 0.999))]
)
def test_decay_tables_of_the_old_adapter_are_golden(old, golden):
    algorithm = nft(old=old)
    assert [algorithm.old_decay(u) for u in (0, 75, 100, 500, 1000)] == pytest.approx(golden)
    assert nft(old="on_policy").old_decay(1000) == 0


def test_decays_of_the_old_adapter_are_their_formulas_at_3000_updates():
    updates = np.arange(3000)
    slow, late = np.minimum(updates / 1000, 0.5), np.clip(3 / 400 * (updates - 75), 0, 0.999)
    for old, expected in (("slow", slow), ("late", late), ("on_policy", 0 * slow)):
        found = [nft(old=old).old_decay(int(update)) for update in updates]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mode", "golden"),
    [
        ("all", (0.0, 0.4, 0.5, 0.6, 1.0)),
        ("positive_only", (0.5, 0.5, 0.5, 0.6, 1.0)),
        ("negative_only", (0.0, 0.4, 0.5, 0.5, 0.5)),
        ("one_only", (0.5, 0.5, 0.5, 0.6, 0.6)),
        ("binary", (0.4, 0.4, 0.5, 0.6, 0.6)),
    ],
)
def test_optimality_of_every_advantage_mode_is_golden(mode, golden):
    optimality = nft(advantage_mode=mode).optimality(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]))
    torch.testing.assert_close(optimality, torch.tensor(golden))


def test_a_rollout_records_nothing_but_its_final_latents(policy):
    assert not nft().needs_density and nft().behaviour == "old"


@pytest.mark.parametrize(
    ("timesteps", "steps", "inner_passes"), [(None, 10, 9), (None, 1, 1), (3, 10, 3), (20, 10, 10)]
)
def test_turns_are_99_percent_of_the_levels_or_what_was_asked_for(timesteps, steps, inner_passes):
    assert nft(timesteps=timesteps).inner_passes(steps, 0) == inner_passes


def test_each_sample_visits_each_rollout_level_at_most_once_in_its_own_order(policy):
    rollout = policy.rollout(SEEDS, adapter="old")
    visited = torch.stack(
        [levels_seen(policy, policy.batch(rollout, ADVANTAGES, inner_pass))[0][0] for inner_pass in range(6)], 1
    )
    levels = torch.from_numpy(policy.sigmas[:-1]).float()
    for row in visited:
        torch.testing.assert_close(row.sort(descending=True).values, levels)
    assert len({tuple(row.tolist()) for row in visited}) > 1


@pytest.mark.parametrize("passes", [range(6), (1, 4), (3,)])
def test_folded_passes_are_the_single_ones_row_by_row(policy, passes):
    torch.nn.init.constant_(policy.adapters["default"].out.bias, 0.5)
    torch.nn.init.constant_(policy.adapters["old"].out.bias, 0.2)
    rollout, algorithm = policy.rollout(SEEDS, adapter="old"), nft(kl_beta=0.2)
    folded, metrics = algorithm.loss(policy, policy.batch(rollout, ADVANTAGES, passes))
    alone = [algorithm.loss(policy, policy.batch(rollout, ADVANTAGES, number)) for number in passes]
    torch.testing.assert_close(folded, torch.cat([loss for loss, _ in alone]), rtol=0, atol=1e-5)
    for name, values in metrics.items():
        torch.testing.assert_close(values, torch.cat([found[name] for _, found in alone]), rtol=0, atol=1e-5)
    assert len(set(folded.tolist())) == len(folded) == 6 * len(passes)
    parts = [torch.autograd.grad(loss.sum(), policy.parameters) for loss, _ in alone]
    for together, *ones in zip(torch.autograd.grad(folded.sum(), policy.parameters), *parts, strict=True):
        torch.testing.assert_close(together, sum(ones), rtol=1e-4, atol=1e-5)


def test_all_velocities_of_a_turn_share_noise_and_each_turn_and_moment_draws_its_own(policy):
    rollout = policy.rollout(SEEDS, adapter="old")

    def noise(inner_pass: int, moment: int = 0) -> torch.Tensor:
        seen = levels_seen(policy, policy.batch(rollout, ADVANTAGES, inner_pass, moment))
        assert all(torch.equal(x, seen[0][1]) and torch.equal(s, seen[0][0]) for s, x in seen)
        level = seen[0][0].view(-1, 1, 1, 1)
        return (seen[0][1] - (1 - level) * rollout.path.x0) / level

    draws = [noise(0), noise(1), noise(0, 1)]
    torch.testing.assert_close(draws[0], noise(0))
    for i in range(3):
        for j in range(i):
            assert not torch.allclose(draws[i], draws[j], atol=1e-2)


def test_equal_adapters_and_no_advantage_is_no_gradient(policy):
    rollout = policy.rollout(SEEDS, adapter="old")
    loss, metrics = nft(kl_beta=1.0).loss(policy, policy.batch(rollout, torch.zeros(6)))
    grads = torch.autograd.grad(loss.sum(), policy.parameters)
    assert max(grad.abs().max() for grad in grads) < 1e-6
    assert (metrics["kl"] == 0).all() and (metrics["old_gap"] == 0).all()


def test_kl_is_the_distance_to_the_base_and_the_old_gap_that_to_the_old_adapter(policy):
    torch.nn.init.constant_(policy.adapters["default"].out.bias, 0.5)
    torch.nn.init.constant_(policy.adapters["old"].out.bias, 0.2)
    batch = policy.batch(policy.rollout(SEEDS, adapter="old"), ADVANTAGES)
    plain, _ = nft().loss(policy, batch)
    pulled, metrics = nft(kl_beta=0.2).loss(policy, batch)
    torch.testing.assert_close(metrics["kl"], torch.full((6,), 0.5**2))
    torch.testing.assert_close(metrics["old_gap"], torch.full((6,), 0.3**2))
    torch.testing.assert_close(pulled, plain + 0.2 * 0.5**2)


def test_an_optimiser_step_moves_the_default_adapter_and_leaves_the_old_one(policy):
    before = [parameter.clone() for parameter in policy.adapters["old"].parameters()]
    first = [parameter.clone() for parameter in policy.parameters]
    optimizer = torch.optim.AdamW(policy.parameters, 1e-2)
    loss, metrics = nft().loss(policy, policy.batch(policy.rollout(SEEDS, adapter="old"), ADVANTAGES))
    loss.sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.adapters["old"].parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, policy.parameters, strict=True))
    assert all(value.shape == (6,) and not value.requires_grad for value in metrics.values())


def test_training_levels_are_floats_of_the_rollouts_table(make_policy):
    policy = make_policy("dpm2", steps=7)
    (sigma, _), *_ = levels_seen(policy, policy.batch(policy.rollout(SEEDS, adapter="old"), ADVANTAGES))
    assert set(sigma.tolist()) <= set(policy.sigmas[:-1].astype(np.float32).tolist())


def test_a_lagged_adapter_that_does_not_lag_costs_no_pass_and_changes_no_bit(policy):
    batch, passes, velocity = policy.batch(policy.rollout(SEEDS), ADVANTAGES, 0), [], policy.velocity

    def loss(follows: bool) -> torch.Tensor:
        passes.clear()
        policy.follows = lambda adapter: follows
        policy.velocity = lambda x, sigma, adapter="default": passes.append(adapter) or velocity(x, sigma, "default")
        return nft().loss(policy, batch)[0]

    whole, seen = loss(False), [*passes]
    assert torch.equal(loss(True), whole) and seen == ["old", "default"] and passes == ["default"]
