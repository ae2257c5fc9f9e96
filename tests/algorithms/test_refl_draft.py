import numpy as np
import pytest
import torch
from pydantic import ValidationError

from align_cluster.algorithms.draft import DRaFT
from align_cluster.algorithms.refl import ReFL
from align_cluster.rollouts.denoise import initial_noise
from align_cluster.rollouts.sampler import recorded_indices
from align_cluster.types import Prompt

from ..drawing import chunk_of

STEPS, SEEDS, STEP = 6, range(40, 48), 3e-3
GOALS = [["goal"]] * len(SEEDS)
KINDS = [("euler", "flow"), ("euler", "epsilon"), ("euler", "v")]


def states(algorithm):
    """The steps that samplers record, one a member."""
    return recorded_indices(chunk_of(Prompt(0, ""), SEEDS), algorithm.states(STEPS))


def touched(policy):
    """A policy whose adapter does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


def gradient(policy, loss):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss.mean(), policy.parameters)])


@pytest.mark.parametrize(("kind", "prediction"), KINDS)
def test_refl_predicts_x0_from_the_state_in_which_the_rollout_was(make_policy, kind, prediction):
    policy = touched(make_policy(kind, STEPS, prediction=prediction))
    algorithm = ReFL(ReFL.Config(steps=(3, 5), margin=None, grad_scale=1.0))
    indices = states(algorithm)
    assert set(indices.ravel()) <= {3, 4, 5} and len(set(indices.ravel())) > 1
    whole = policy.rollout(SEEDS, range(STEPS)).path
    rollout = policy.rollout(SEEDS, indices)
    assert rollout.path.log_probs is None and rollout.path.after is None
    for row, (k,) in enumerate(indices):
        assert torch.equal(rollout.path.before[row, 0], whole.before[row, k])
    loss, metrics = algorithm.loss(policy, policy.batch(rollout, torch.zeros(len(SEEDS))))
    x, level = rollout.path.before[:, 0], torch.tensor(policy.sigmas[indices[:, 0]]).float().view(-1, 1, 1, 1)
    output, a = policy.velocity(x, level.flatten()), torch.sqrt(1 - level**2)
    x0 = {"flow": x - level * output, "epsilon": (x - level * output) / a, "v": a * x - level * output}[prediction]
    torch.testing.assert_close(-loss, policy.rewards(x0, GOALS)[:, 0])
    torch.testing.assert_close(metrics["reward"], -loss.detach())
    assert gradient(policy, loss).norm() > 1e-3


def test_refl_takes_noise_on_the_way_and_predicts_x0_from_where_it_led(make_policy):
    """The official script draws with DDPM's noise, which is DDIM's with eta 1."""
    policy = touched(make_policy("ddim", STEPS, prediction="epsilon"))
    algorithm = ReFL(ReFL.Config(steps=(3, 5), margin=None, grad_scale=1.0))
    window, indices = algorithm.states(STEPS), states(algorithm)
    assert window.noisy == tuple(range(STEPS))
    rollout, still = (policy.rollout(SEEDS, indices, noisy=noisy) for noisy in (window.noisy, ()))
    assert not torch.allclose(rollout.path.before, still.path.before)
    loss, _ = algorithm.loss(policy, policy.batch(rollout, torch.zeros(len(SEEDS))))
    x, level = rollout.path.before[:, 0], torch.tensor(policy.sigmas[indices[:, 0]]).float().view(-1, 1, 1, 1)
    x0 = (x - level * policy.velocity(x, level.flatten())) / torch.sqrt(1 - level**2)
    torch.testing.assert_close(-loss, policy.rewards(x0, GOALS)[:, 0])


@pytest.mark.parametrize("algorithm", [ReFL(ReFL.Config(steps=(3, 5), margin=None)), DRaFT(DRaFT.Config(last=2))])
def test_cut_timesteps_reach_the_network_and_nothing_else(make_policy, algorithm):
    policy = touched(make_policy("euler", STEPS, truncate_timesteps=True))
    fed, real = [], policy.velocity
    policy.velocity = lambda x, sigma, adapter="default": fed.append(sigma) or real(x, sigma, adapter)
    rollout = policy.rollout(SEEDS, states(algorithm))
    loss, _ = algorithm.loss(policy, policy.batch(rollout, torch.zeros(len(SEEDS))))
    for sigma in fed:
        assert torch.equal(sigma, torch.trunc(1000 * sigma + 0.01) / 1000)
    assert len(fed) == STEPS + (1 if isinstance(algorithm, ReFL) else 2) and (policy.sigmas[1] * 1000) % 1 > 0.1
    if isinstance(algorithm, DRaFT):
        torch.testing.assert_close(-loss, policy.rewards(rollout.path.x0, GOALS)[:, 0], rtol=1e-5, atol=1e-5)
    else:
        x, level = rollout.path.before[:, 0], torch.tensor(policy.sigmas[rollout.indices[:, 0]]).float()
        x0 = x - level.view(-1, 1, 1, 1) * real(x, torch.trunc(1000 * level) / 1000)
        torch.testing.assert_close(-loss, 1e-3 * policy.rewards(x0, GOALS)[:, 0])


def test_refl_stops_at_its_margin_and_scales_its_loss(make_policy):
    policy = touched(make_policy("euler", STEPS))
    rollout = policy.rollout(SEEDS, states(ReFL(ReFL.Config(steps=(3, 5)))))
    batch = policy.batch(rollout, torch.zeros(len(SEEDS)))
    free = ReFL(ReFL.Config(steps=(3, 5), margin=None, grad_scale=1.0)).loss(policy, batch)[1]["reward"]
    middle = free.median().item()
    loss, metrics = ReFL(ReFL.Config(steps=(3, 5), margin=middle, grad_scale=0.5)).loss(policy, batch)
    torch.testing.assert_close(loss, 0.5 * torch.relu(middle - free))
    assert torch.equal(metrics["satisfied"], (free >= middle).float()) and 0 < metrics["satisfied"].mean() < 1


@pytest.mark.parametrize(("kind", "prediction"), KINDS)
@pytest.mark.parametrize("last", [1, 3, STEPS])
def test_draft_ends_where_the_rollout_did_and_has_its_gradient(make_policy, kind, prediction, last):
    """Against finite differences of the reward in a random direction of the parameters, over the last steps alone."""
    policy = touched(make_policy(kind, STEPS, prediction=prediction))
    algorithm = DRaFT(DRaFT.Config(last=last))
    rollout = policy.rollout(SEEDS, states(algorithm))
    batch = policy.batch(rollout, torch.zeros(len(SEEDS)))
    loss, metrics = algorithm.loss(policy, batch)
    torch.testing.assert_close(metrics["reward"], policy.rewards(rollout.path.x0, GOALS)[:, 0], rtol=1e-5, atol=1e-5)
    found = gradient(policy, loss)
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=generator) for p in policy.parameters]
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, part in zip(policy.parameters, direction, strict=True):
                parameter.add_(sign * STEP * part)
            ends.append(algorithm.loss(policy, batch)[0].mean().item())
            for parameter, part in zip(policy.parameters, direction, strict=True):
                parameter.sub_(sign * STEP * part)
    slope = (torch.cat([part.flatten() for part in direction]) * found).sum().item()
    assert (ends[0] - ends[1]) / (2 * STEP) == pytest.approx(slope, rel=1e-2, abs=1e-3)


def test_draft_lv_noises_the_drawn_image_again_each_turn_anew(make_policy):
    policy = touched(make_policy("euler", STEPS))
    algorithm = DRaFT(DRaFT.Config(renoised=2))
    assert algorithm.states(STEPS) is None and algorithm.inner_passes(STEPS, 0) == 2
    rollout = policy.rollout(SEEDS)
    losses = []
    for inner_pass in (0, 1):
        batch = policy.batch(rollout, torch.zeros(len(SEEDS)), inner_pass)
        loss, _ = algorithm.loss(policy, batch)
        sigma = float(policy.sigmas[-2])
        noise = initial_noise(batch.generators("noise"), (2, 1, 1))
        x = (1 - sigma) * rollout.path.x0 + sigma * noise
        ended = x - sigma * policy.velocity(x, torch.full((len(SEEDS),), sigma))
        torch.testing.assert_close(-loss, policy.rewards(ended, GOALS)[:, 0], rtol=1e-5, atol=1e-5)
        losses.append(loss)
    assert not torch.equal(*losses)


@pytest.mark.parametrize("passes", [range(3), (0, 2), (1,)])
def test_draft_lv_folded_is_its_single_passes_row_by_row_each_image_by_its_own_text(make_policy, passes):
    policy = touched(make_policy("euler", STEPS))
    algorithm, texts = DRaFT(DRaFT.Config(renoised=3)), ("goal", "more goal", "less goal", "goal") * 2
    rollout = policy.rollout(SEEDS)

    def losses(numbers):
        return algorithm.loss(policy, policy.batch(rollout, torch.zeros(len(SEEDS)), numbers, prompts=texts))

    folded, metrics = losses(passes)
    alone = [losses(number) for number in passes]
    torch.testing.assert_close(folded, torch.cat([loss for loss, _ in alone]), rtol=0, atol=1e-5)
    torch.testing.assert_close(metrics["reward"], torch.cat([found["reward"] for _, found in alone]), rtol=0, atol=1e-5)
    together = gradient(policy, folded)
    torch.testing.assert_close(together, sum(gradient(policy, loss) for loss, _ in alone) / len(alone))
    for text in set(texts):
        own = [place for place, other in enumerate(texts) if other == text]
        plain = algorithm.loss(policy, policy.batch(rollout, torch.zeros(len(SEEDS)), passes[0], prompts=[text] * 8))[0]
        torch.testing.assert_close(folded[own], plain[own], rtol=0, atol=1e-5)


def test_states_that_a_deterministic_rollout_records_carry_no_noise_and_no_density(make_policy):
    algorithm = DRaFT(DRaFT.Config(last=2))
    assert algorithm.states(STEPS).noisy == () and (states(algorithm) == STEPS - 2).all()
    assert states(ReFL(ReFL.Config(steps=(5, 5)))).tolist() == [[5]] * len(SEEDS)


def test_every_member_draws_its_step_by_its_own_seed():
    algorithm = ReFL(ReFL.Config(steps=(0, 5)))
    whole = states(algorithm)
    halves = [
        recorded_indices(chunk_of(Prompt(0, ""), part), algorithm.states(STEPS)) for part in (SEEDS[:4], SEEDS[4:])
    ]
    np.testing.assert_array_equal(whole, np.concatenate(halves))


def test_steps_out_of_order_are_refused():
    with pytest.raises(ValidationError, match="not above the last"):
        ReFL.Config(steps=(9, 7))
