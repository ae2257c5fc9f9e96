"""SLAS's trust region (appendix E of the paper): the largest gamma whose update keeps its KL within `delta`.

An update theta += a g, g the mean of A grad log p over samples, with score gradients no longer than G, has

    KL ~ 1/2 a^2 g^T H g <= 1/2 a^2 lambda_max G^2 E|A|^(2 (1 + gamma)) <= delta,

H being the Fisher matrix, so gamma is safe while the moment E|u|^(2 (1 + gamma)) stays below Bd = 2 delta /
(a^2 lambda_max G^2). That is a worst case: the mean g of many scores is far shorter than the longest one and hardly
along the first eigenvector. What an update really did is KL; it is proportional to the moment, so Bd = delta M / KL
with the moment M that it was made with. The learner measures all of it; this half runs on the driver.
"""

import math

import numpy as np

from align_cluster.algorithms.advantage import Slas


def moment(u: np.ndarray, gamma: float) -> float:
    """Mean |u|^(2 (1 + gamma)) of linear advantages u, scaled to a mean square of 1: it never falls as gamma grows.

    Advantages that are all 0 have moment 0.
    """
    square = np.asarray(u, dtype=np.float64) ** 2
    mean = square.mean()
    return float(np.mean((square / mean) ** (1 + gamma))) if mean > 0 else 0.0


def largest_gamma(u: np.ndarray, bound: float, gamma_max: float, tol: float = 1e-6) -> float:
    """The largest gamma in [0, gamma_max] with moment(u, gamma) <= bound, less `tol` at most; 0 where none is."""
    if moment(u, gamma_max) <= bound:
        return gamma_max
    low, high = 0.0, gamma_max
    while high - low > tol:
        middle = (low + high) / 2
        low, high = (middle, high) if moment(u, middle) <= bound else (low, middle)
    return low


def bound(delta: float, step_norm: float, gradient_norm: float, lambda_max: float, score_norm: float) -> float:
    """Bd = 2 delta / (a^2 lambda_max G^2), with a = |change of parameters| / |gradient|, AdamW's real step size.

    delta and lambda_max count per latent dimension, as mean log-probs do; score_norm is G. Infinite for an update that
    changes no distribution.
    """
    scale = step_norm**2 * lambda_max * score_norm**2
    return math.inf if scale == 0 else 2 * delta * gradient_norm**2 / scale


class TrustRegion:
    """Adaptive gamma: an exponential mean of estimates, corrected for its start as Adam's are."""

    def __init__(self, config: Slas) -> None:
        self.config = config
        self._sum = self._weight = 0.0

    @property
    def gamma(self) -> float:
        """What to shape with now: 0, which leaves advantages linear, before the first estimate."""
        return self._sum / self._weight if self._weight else 0.0

    def observe(self, estimates: dict[str, float], u: np.ndarray) -> dict[str, float]:
        """Take in one update's estimates, made with the gamma of now, and return what to log.

        lambda_max, score_norm, step_norm and gradient_norm are as in `bound`, step_kl is the update's KL a latent
        dimension; `u` are the linear advantages of that step's samples, masked ones left out. An update without a
        gradient or a step is no evidence and leaves gamma as it is.
        """
        config, used = self.config, moment(u, self.gamma)
        lengths = {name: estimates[name] for name in ("step_norm", "gradient_norm", "lambda_max", "score_norm")}
        limit = bound(config.delta, **lengths)
        if config.bound == "measured":
            limit = config.delta * used / estimates["step_kl"] if estimates["step_kl"] else math.inf
        if used and lengths["step_norm"] > 0 and lengths["gradient_norm"] > 0:
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
        """What a checkpoint keeps."""
        return {"sum": self._sum, "weight": self._weight}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from `state()` of an earlier run."""
        self._sum, self._weight = state["sum"], state["weight"]
