import pytest
import torch

from align_cluster.algorithms.ppo import PPO
from align_cluster.algorithms.terms import clipped_value_loss


def test_a_value_that_has_moved_less_than_the_clip_pays_its_squared_error():
    values, before, returns = torch.tensor([0.1, -0.3]), torch.tensor([0.0, -0.2]), torch.tensor([1.0, 1.0])
    torch.testing.assert_close(clipped_value_loss(values, before, returns, 0.2), 0.5 * (values - returns) ** 2)


def test_the_clipped_loss_is_never_below_the_plain_one_and_stops_paying_for_large_moves():
    generator = torch.Generator().manual_seed(0)
    values, before, returns = torch.randn(3, 1000, generator=generator)
    values.requires_grad_(True)
    loss = clipped_value_loss(values, before, returns, 0.2)
    assert (loss >= 0.5 * (values - returns) ** 2 - 1e-7).all()
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    # Past the clip, towards the return and short of it: nothing more is to be gained in this step.
    done = ((values - before).abs() > 0.2) & ((returns - values) * (values - before) > 0)
    assert done.any() and not gradient[done].any()


def test_heads_whose_reward_does_not_judge_a_sample_get_no_gradient_from_it():
    returns = torch.tensor([[1.0, float("nan")], [0.5, 2.0]])
    values = torch.tensor([[0.3, 0.7], [0.1, -0.4]], requires_grad=True)
    loss = PPO(PPO.Config(value_clip=100)).value_loss(values, torch.zeros(2, 2), returns)
    assert loss.tolist() == pytest.approx([0.5 * 0.7**2, 0.25 * (0.4**2 + 2.4**2)])
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert gradient[0, 1] == 0 and torch.isfinite(gradient).all() and gradient.count_nonzero() == 3


def test_while_the_actor_waits_a_value_may_move_as_far_as_it_likes():
    values, before = torch.tensor([[0.9], [0.1]]), torch.zeros(2, 1)
    algorithm = PPO(PPO.Config(value_clip=0.2))
    assert algorithm.value_loss(values, before, torch.ones(2, 1)).tolist() == pytest.approx([0.32, 0.405])
    assert algorithm.value_loss(values, before, torch.ones(2, 1), pretraining=True).tolist() == pytest.approx(
        [0.005, 0.405]
    )
