"""SLAS's trust region (appendix E of the paper): the largest gamma that keeps an update's KL within `delta`.

An update theta += a g, g the mean of A grad log p over samples, with score gradients no longer than G, has

    KL ~ 1/2 a^2 g^T H g <= 1/2 a^2 lambda_max G^2 E|A|^(2 (1 + gamma)) <= delta,

H being the Fisher matrix. So gamma is safe while the moment E|u|^(2 (1 + gamma)) stays below Bd = 2 delta / (a^2
lambda_max G^2). That is a worst case: the mean g of many scores is far shorter than the longest score, and hardly along
the first eigenvector. On the embedded model Bd is 5.6e-5, and a linear step has moment 1, so gamma is always 0. The
learner measures these numbers; this file runs on the driver.
"""

import math

import numpy as np

from align_cluster.algorithms.slas import Slas, largest_gamma, moment


def bound(delta: float, step_norm: float, gradient_norm: float, lambda_max: float, score_norm: float) -> float:
    """Return Bd = 2 delta / (a^2 lambda_max G^2), where a = step_norm / gradient_norm is AdamW's real step size.

    step_norm is the length of the change of parameters, score_norm is G. delta and lambda_max count per latent
    dimension, as mean log-probs do. The bound is infinite for an update that changes no distribution.
    """
    scale = step_norm**2 * lambda_max * score_norm**2
    return math.inf if scale == 0 else 2 * delta * gradient_norm**2 / scale


class TrustRegion:
    """Adapts gamma: an exponential mean of estimates, with Adam's correction for its start."""

    def __init__(self, config: Slas) -> None:
        self.config = config
        self._sum = self._weight = 0.0

    @property
    def gamma(self) -> float:
        """Return the present gamma; it is 0, which leaves advantages linear, before the first estimate."""
        return self._sum / self._weight if self._weight else 0.0

    def observe(self, estimates: dict[str, float], u: np.ndarray) -> dict[str, float]:
        """Add the estimates of one update, which was made with the present gamma, and return metrics to log.

        lambda_max, score_norm, step_norm and gradient_norm are those of `bound`; step_kl is the update's KL per latent
        dimension. `u` are the linear advantages of that step's samples, without masked ones. An update without a
        gradient or a step is no evidence and leaves gamma unchanged.
        """
        config = self.config
        lengths = {name: estimates[name] for name in ("step_norm", "gradient_norm", "lambda_max", "score_norm")}
        limit = bound(config.delta, **lengths)
        if np.any(u) and lengths["step_norm"] > 0 and lengths["gradient_norm"] > 0:
            self._sum = config.ema * self._sum + (1 - config.ema) * largest_gamma(u, limit, config.gamma_max)
            self._weight = config.ema * self._weight + (1 - config.ema)
        return {
            "slas/gamma": self.gamma,
            "slas/moment": moment(u, self.gamma),
            "slas/bound": limit,
            "slas/step_kl": estimates["step_kl"],
            "slas/lambda_max": estimates["lambda_max"],
            "slas/score_norm": estimates["score_norm"],
        }

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"sum": self._sum, "weight": self._weight}

    def restore(self, state: dict[str, float]) -> None:
        """Continue from `state()` of an earlier run."""
        self._sum, self._weight = state["sum"], state["weight"]
