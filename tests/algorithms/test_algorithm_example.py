import re
from pathlib import Path

import numpy as np
import pytest
import torch

import align_cluster.algorithms
from align_cluster.algorithms.advantage import AdvantageConfig, normalise

README = Path(align_cluster.algorithms.__file__).with_name("README.md")


def example() -> tuple[type, str]:
    """The class that the README tells a newcomer to write, and its text."""
    (text,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(text, str(README), "exec"), names)
    return names["Reinforce"], text


def test_the_readmes_algorithm_has_fewer_than_25_lines_and_aligns_the_toy(make_policy):
    kind, text = example()
    assert sum(bool(line.strip()) for line in text.splitlines()) < 25
    policy, algorithm = make_policy("flow_sde"), kind(kind.Config(kind="reinforce:Reinforce"))
    optimizer = torch.optim.AdamW(policy.parameters, 2e-2)
    target, scores = torch.tensor([1.5, -1.0]), []
    for update in range(50):
        rollout = policy.rollout(range(64 * update, 64 * update + 64), tuple(range(5)))
        rewards = -((rollout.path.x0.flatten(1) - target) ** 2).sum(1)
        scores.append(rewards.mean().item())
        values = normalise(rewards.numpy()[None], np.ones((1, 64), bool), AdvantageConfig(), np.zeros((1, 64), int))[0]
        optimizer.zero_grad()
        for inner_pass in range(algorithm.inner_passes(6, 5)):
            loss, metrics = algorithm.loss(
                policy, policy.batch(rollout, torch.from_numpy(values).float(), inner_pass, update)
            )
            algorithm.check_metrics(metrics)
            loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
        optimizer.step()
    assert kind.needs_density
    with pytest.raises(ValueError, match="too many values"):
        algorithm.loss(policy, policy.batch(rollout, torch.zeros(64), range(2)))
    assert np.mean(scores[-5:]) > 0.5 * np.mean(scores[:5])
