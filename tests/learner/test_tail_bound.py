"""SLAS's adaptive exponent on real updates of the embedded model, beside fixed ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align_cluster.algorithms.advantage import credit
from align_cluster.config.load import load
from align_cluster.loop.learning import step_micro_batches
from align_cluster.loop.requests import plan_chunks, training_request
from align_cluster.prompts import PROMPTS
from align_cluster.types import Credit

from ..inprocess import Workers, own_environment

SLAS = Path(__file__).parents[2] / "configs" / "embedded_slas.yaml"
SIZE = ("prompts_per_step=4", "rollout.group_size=6", "rollout.steps=4", "learner.updates_per_step=1")
TAIL, OUTLIER = 2.0, (1, 2)  # the setting's default; the group and member of an image that beats all others by far


def test_updates_follow_one_outlier_as_far_as_the_tail_allows_and_no_fixed_exponent_is_as_safe():
    """The moment is that of the advantages that the learner trains with. What it bounds is seen in weights: how much of
    an update's direction is that of an update by the outlier alone."""
    with own_environment():
        workers = Workers(load(SLAS, [*SIZE, "advantage.shaping.gamma=adaptive", "advantage.clip=null"]))
        config = workers.config
        prompts = PROMPTS[config.prompts.kind](config.prompts).load()
        workers.publish("behaviour")
        drawn = workers.draw(plan_chunks(config, prompts, 0), training_request(config, 0, workers.version))
        start = workers.learner.state()
        shape = (config.prompts_per_step, config.group_members)
        ordinary = np.concatenate([item.scores.values["clip"] for item in drawn]).reshape(shape)
        outlying = ordinary.copy()
        outlying[OUTLIER] += 30 * ordinary.std()

        def credited(rewards: np.ndarray, gamma: float | None) -> Credit:
            one = (np.ones((1, *shape), bool), np.ones(shape, bool), np.ones(1))
            return credit(rewards[None], *one, config.advantage, np.zeros(shape, int), gamma=gamma)

        def moved(found: Credit) -> np.ndarray:
            workers.learner.restore(start)
            workers.update(0, drawn, found)
            after, before = (one.tensors() for one in (workers.learner.state(), start))
            names = [name for name in before if name.startswith("adapter/")]
            return np.concatenate([(after[name] - before[name]).ravel() for name in names])

        def trained(found: Credit) -> np.ndarray:
            pieces = step_micro_batches(config, [item.chunk for item in drawn], found)
            return np.concatenate([piece.advantages for piece in pieces]).astype(np.float64)

        usual, cautious = (credited(rewards, None).metrics["advantage/gamma"] for rewards in (ordinary, outlying))
        assert usual > 2 * cautious > 0
        linear = credited(outlying, 0.0)
        alone = np.zeros(shape, np.float32)
        alone[OUTLIER] = 1
        direction, followed = moved(replace(linear, advantages=alone)), {}
        for gamma in (0.0, None, 2.0):
            found = credited(outlying, gamma)
            used = found.metrics["advantage/gamma"]
            moment = np.mean(trained(found) ** 2) / np.mean(trained(linear) ** 2) ** (1 + used)
            assert found.metrics["advantage/moment"] == pytest.approx(moment, rel=1e-4)
            assert (moment <= TAIL * (1 + 1e-5)) == (gamma != 2.0)
            update = moved(found)
            followed[gamma] = update @ direction / np.linalg.norm(update) / np.linalg.norm(direction)
        assert followed[0.0] < followed[None] < followed[2.0] - 0.05  # .62, .71, .81 with six images a group
