import numpy as np
import pytest
import torch

from align_cluster.algorithms.advantage import AdvantageConfig, normalise
from align_cluster.algorithms.grpo import GRPO
from align_cluster.algorithms.nft import NFT

UPDATES, IMAGES = 50, 64
MODES = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
WIDTH = 0.3


def credit(rewards: torch.Tensor, std: str) -> torch.Tensor:
    values = rewards.numpy().astype(np.float64)[None]
    ones, batch = np.ones_like(values, bool), np.zeros_like(values, int)
    return torch.from_numpy(normalise(values, ones, AdvantageConfig(std=std), batch)[0]).float()


def mixture_velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[eps - x0 | x_t = x] where x0 is drawn from two equally likely Gaussians at MODES."""
    t = sigma.view(-1, 1)
    flat = x.flatten(1)
    variance = (1 - t) ** 2 * WIDTH**2 + t**2
    offsets = flat[:, None] - (1 - t)[:, :, None] * MODES  # [B, mode, 2]
    odds = torch.softmax(-(offsets**2).sum(2) / (2 * variance), 1)
    x0 = MODES + ((1 - t) * WIDTH**2 / variance)[:, :, None] * offsets
    x0 = (odds[:, :, None] * x0).sum(1)
    return ((flat - x0) / t).view_as(x)


@pytest.mark.parametrize("kl_beta", [0.0, 0.01])
def test_grpo_with_the_flow_sde_moves_points_to_the_target_in_50_updates(make_policy, kl_beta):
    policy, algorithm = make_policy("flow_sde"), GRPO(GRPO.Config(kl_beta=kl_beta))
    optimizer = torch.optim.AdamW(policy.parameters, 2e-2)
    target, scores = torch.tensor([1.5, -1.0]), []
    for update in range(UPDATES):
        rollout = policy.rollout(range(update * IMAGES, (update + 1) * IMAGES), tuple(range(5)))
        rewards = -((rollout.path.x0.flatten(1) - target) ** 2).sum(1)
        scores.append(rewards.mean().item())
        credited, turns = credit(rewards, "group"), algorithm.turns(6, 5)
        optimizer.zero_grad()
        for turn in range(turns):
            loss, metrics = algorithm.loss(policy, policy.batch(rollout, credited, turn, update))
            assert metrics["log_ratio"].abs().max() < 1e-6  # one update a rollout is exactly on-policy
            (loss.mean() / turns).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
        optimizer.step()
    first, last = np.mean(scores[:5]), np.mean(scores[-5:])
    assert last > first + 0.5 * abs(first), (first, last)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_nft_moves_mass_to_the_rewarded_mode(make_policy, beta):
    policy = make_policy("dpm2", steps=8, base=mixture_velocity)
    algorithm = NFT(NFT.Config(beta=beta, old="slow"))
    optimizer = torch.optim.AdamW(policy.parameters, 2e-2)
    for update in range(UPDATES):
        rollout = policy.rollout(range(update * IMAGES, (update + 1) * IMAGES), adapter="old")
        rewards = (rollout.path.x0[:, 0, 0, 0] > 0).float()
        credited = credit(rewards, "global")
        optimizer.zero_grad()
        for turn in range(4):
            loss, _ = algorithm.loss(policy, policy.batch(rollout, credited, turn, update))
            (loss.mean() / 4).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
        optimizer.step()
        decay = algorithm.old_decay(update + 1)
        with torch.no_grad():
            for old, new in zip(policy.adapters["old"].parameters(), policy.parameters, strict=True):
                old.lerp_(new, 1 - decay)
    seeds = range(10**6, 10**6 + 500)
    share = {}
    for adapter in ("default", "old"):
        share[adapter] = (policy.rollout(seeds, adapter=adapter).path.x0[:, 0, 0, 0] > 0).float().mean().item()
    untouched = make_policy("dpm2", steps=8, base=mixture_velocity).rollout(seeds).path.x0[:, 0, 0, 0]
    assert (untouched > 0).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert share["old"] > 0.75 and share["default"] > 0.75, share
