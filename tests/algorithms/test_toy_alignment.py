import numpy as np
import pytest
import torch

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.advantage import AdvantageConfig, normalise
from align_cluster.algorithms.grpo import GRPO
from align_cluster.algorithms.nft import NFT
from align_cluster.rollouts.sampler import recorded_indices
from align_cluster.rollouts.windows import WINDOWS
from align_cluster.streams import stream
from align_cluster.types import Prompt

from ..drawing import chunk_of

STEPS = 6
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


RUNS = {
    "flow_sde": {"policy": {"kind": "flow_sde"}},
    "flow_sde and KL": {"policy": {"kind": "flow_sde"}, "grpo": {"kl_beta": 0.01}},
    "flow_sde guarded, two updates a rollout": {
        "policy": {"kind": "flow_sde"},
        "grpo": {"ratio": "guard", "clip": 0.01},
        "reuse": 2,
    },
    "flow_sde in a sliding window": {
        "policy": {"kind": "flow_sde"},
        "window": {"kind": "sliding", "size": 2, "iters_per_group": 5},
    },
    "dance_sde, each sample its own steps": {
        "policy": {"kind": "dance_sde", "truncate_timesteps": True},
        "window": {"kind": "fraction", "choice": "per_sample", "fraction": 0.6},
    },
    "cps": {"policy": {"kind": "cps"}},
    "flow_ddim": {"policy": {"kind": "flow_ddim"}},
    "ddim": {"policy": {"kind": "ddim", "prediction": "epsilon"}},
}


def planned(update: int, settings: dict):
    """(seeds, noisy steps, recorded steps [B, K]) of one rollout, as a run plans them."""
    kind = WINDOWS[settings["kind"]]
    window = kind(kind.Config(**settings)).plan(STEPS, update, update)
    seeds = range(update * IMAGES, (update + 1) * IMAGES)
    return seeds, window.noisy, recorded_indices(chunk_of(Prompt(0, ""), seeds, step=update), window)


@pytest.mark.parametrize("run", RUNS)
def test_grpo_moves_points_to_the_target_in_50_updates(make_policy, run):
    settings = {"window": {"kind": "fraction"}, "grpo": {}, "reuse": 1} | RUNS[run]
    policy = make_policy(steps=STEPS, **settings["policy"])
    algorithm = GRPO(GRPO.Config(**({"kl_beta": 0.0} | settings["grpo"])))
    optimizer = torch.optim.AdamW(policy.parameters, 2e-2)
    target, gains, scores = torch.tensor([1.5, -1.0]), [], []

    def reward(rollout) -> torch.Tensor:
        return -((rollout.path.x0.flatten(1) - target) ** 2).sum(1)

    for update in range(UPDATES):
        if update % settings["reuse"] == 0:
            seeds, noisy, indices = planned(update, settings["window"])
            rollout = policy.rollout(seeds, indices, noisy=noisy)
            rewards, untrained = reward(rollout), reward(policy.rollout(seeds, adapter=None, noisy=noisy))
            scores.append(untrained.mean().item())
            gains.append(rewards.mean().item() - scores[-1])
            credited, inner_passes = credit(rewards, "group"), algorithm.inner_passes(STEPS, indices.shape[1])
        optimizer.zero_grad()
        for inner_pass in range(inner_passes):
            loss, metrics = algorithm.loss(policy, policy.batch(rollout, credited, inner_pass, update))
            on_policy = update % settings["reuse"] == 0
            assert on_policy == bool(metrics["log_ratio"].abs().max() < 1e-6)
            (loss.mean() / inner_passes).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
        optimizer.step()
    # Against the untrained policy with the same noise, whose gain is exactly the 0 of the first rollout.
    assert gains[0] == 0 and np.mean(gains[-5:]) > 0.8 * abs(np.mean(scores[-5:])), (gains, scores)


def test_outside_its_window_a_rollout_takes_ode_steps(make_policy):
    policy = make_policy("flow_sde", steps=STEPS)
    path = policy.rollout(range(IMAGES), range(STEPS), noisy=(2, 3)).path
    for k in range(STEPS):
        x, level = path.before[:, k], torch.full((IMAGES,), float(policy.sigmas[k]))
        ode = policy.step.advance(k, x, policy.velocity(x, level).detach())
        assert torch.equal(path.after[:, k], ode) == (k not in (2, 3))


@pytest.mark.parametrize(("kind", "prediction"), [("euler", "flow"), ("ddim", "epsilon"), ("ddim", "v")])
def test_the_untrained_toys_follow_the_exact_flow_of_their_data_law(make_policy, kind, prediction):
    policy, seeds = make_policy(kind, steps=400, prediction=prediction), range(16)
    x0 = policy.rollout(seeds, noisy=()).path.x0
    noise = torch.stack([torch.randn(2, 1, 1, generator=stream(seed)) for seed in seeds])
    mean, width = policy.law
    laws = []
    for s in policy.sigmas[[0, -1]]:  # x is normal at each level, and keeps its quantile
        a = 1 - s if prediction == "flow" else np.sqrt(1 - s**2)
        laws.append((a * mean, np.sqrt((a * width) ** 2 + s**2)))
    (mean_before, std_before), (mean_after, std_after) = laws
    exact = mean_after + std_after * (noise - mean_before) / std_before
    torch.testing.assert_close(x0, exact.float(), rtol=0, atol=0.01)


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
        for inner_pass in range(4):
            loss, _ = algorithm.loss(policy, policy.batch(rollout, credited, inner_pass, update))
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


DIRECT = {
    "srpo, difference of words": {"kind": "srpo", "form": "difference"},
    "srpo, released form, both branches": {"kind": "srpo"},
    "srpo, three injections": {"kind": "srpo", "form": "difference", "injections": 3, "gap": 200},
    "direct-align": {"kind": "srpo", "relative": "none", "branches": "denoise"},
    "refl": {"kind": "refl", "steps": (3, 5), "margin": None, "grad_scale": 1.0},
    "draft": {"kind": "draft", "last": STEPS},
    "draft-1": {"kind": "draft", "last": 1},
    "draft-lv": {"kind": "draft", "renoised": 2},
}
WORDS = {"positive": ("more",), "negative": ("less",), "template": "{word} {prompt}", "levels": (0.9, 0.3)}


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
@pytest.mark.parametrize("run", DIRECT)
def test_gradients_of_rewards_move_points_in_50_updates(make_policy, run, prediction):
    settings = dict(DIRECT[run])
    if settings["kind"] == "srpo":
        settings |= WORDS | {"margin": None}
    kind = ALGORITHMS[settings["kind"]]
    algorithm, policy = kind(kind.Config(**settings)), make_policy("euler", STEPS, prediction=prediction)
    optimizer = torch.optim.AdamW(policy.parameters, 2e-2)
    goals = ("more goal", "less goal") if "words" in run or "released" in run or "injections" in run else ("goal",)

    def reward(adapter) -> float:
        x0 = policy.rollout(range(10**6, 10**6 + 200), adapter=adapter).path.x0
        scores = policy.rewards(x0, [goals] * len(x0))
        return (scores[:, 0] - (scores[:, 1] if len(goals) > 1 else 0)).mean().item()

    for update in range(UPDATES):
        seeds = range(update * IMAGES, (update + 1) * IMAGES)
        window = algorithm.states(STEPS)
        chosen = recorded_indices(chunk_of(Prompt(0, ""), seeds, step=update), window) if window else ()
        rollout = policy.rollout(seeds, chosen)
        optimizer.zero_grad()
        inner_passes = algorithm.inner_passes(STEPS, 1)
        for inner_pass in range(inner_passes):
            loss, _ = algorithm.loss(policy, policy.batch(rollout, torch.zeros(IMAGES), inner_pass, update))
            (loss.mean() / inner_passes).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
        optimizer.step()
    before, after = reward(None), reward("default")
    assert after > before + 0.5 * abs(before), (before, after)
