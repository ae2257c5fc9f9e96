"""Turns a step's scores into advantages. Its one piece of state is SLAS's exponent under `bound: worst_case`."""

from typing import Any

import numpy as np

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.advantage import credit, linear, usable
from align_cluster.algorithms.trust import TrustRegion
from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import Reduced
from align_cluster.loop.rollouts import DrawnChunk
from align_cluster.rewards.mix import lost, table
from align_cluster.types import Credit

LARGEST = (
    "lambda_max",
    "score_norm",
    "step_norm",
    "gradient_norm",
)  # the largest over ranks; only score_norm differs between them


class AdvantageEstimator:
    """Estimates advantages step by step, over all groups of a step at once."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        shaping = config.advantage.shaping
        self.trust = TrustRegion(shaping) if shaping and shaping.probes else None

    def assign(self, drawn: list[DrawnChunk], values: None = None) -> Credit:
        """Return advantages [P, M] of a step from all its scores; groups are the rows. `values` belong to a critic."""
        if ALGORITHMS[self.config.algorithm.kind].reward_gradient:
            shape = (self.config.prompts_per_step, self.config.group_members)
            finite = np.concatenate([item.finite for item in drawn]).reshape(shape)
            return Credit(np.zeros(shape, np.float32), finite, {})  # the learner follows the rewards' gradient itself
        arguments = self._arguments(drawn)
        gamma = self.trust.gamma if self.trust else None
        return credit(*arguments, self.config.conditions, gamma, self.config.anchored)

    def observe(self, drawn: list[DrawnChunk], trained: dict[str, Reduced]) -> dict[str, float]:
        """Take in what the learner measured during its update, if it did, and return metrics of it."""
        if self.trust is None or "lambda_max" not in trained:
            return {}
        values, applies, valid, weights, settings, batches = self._arguments(drawn)
        u = linear(values, applies, valid, weights, settings, batches)
        estimates = {name: trained[name].largest for name in LARGEST} | {"step_kl": trained["step_kl"].mean}
        return self.trust.observe(estimates, u[usable(values, applies, valid, weights)])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"trust": self.trust.state()} if self.trust else {}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that a checkpoint keeps."""
        return {}

    def restore(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Go on from the state of an earlier run."""
        if self.trust:
            self.trust.restore(state["trust"])

    def _arguments(self, drawn: list[DrawnChunk]) -> tuple:
        shape = (self.config.prompts_per_step, self.config.group_members)
        values, applies, valid, weights = table([item.scores for item in drawn], self.config.rewards)
        bounds = self.config.update_bounds
        batches = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))  # the optimiser update of each row
        whole = ~lost([item.scores for item in drawn], self.config.rewards).reshape(shape).any(1, keepdims=True)
        return (
            values.reshape(-1, *shape),
            applies.reshape(-1, *shape),
            valid.reshape(shape) & whole,
            weights,
            self.config.advantage,
            batches.reshape(shape),
        )
