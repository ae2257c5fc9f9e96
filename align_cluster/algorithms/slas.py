"""Settings of SLAS, and how large its exponent may be: pure functions of a step's linear advantages."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from align_cluster.settings import Root, Section

# log10 of the largest advantage that is allowed: its square fits fp32, or fp64 where a clip comes before the loss.
MOST, MOST_CLIPPED = 18, 150


class Slas(Section):
    """Super-linear advantage shaping (SLAS): u becomes sign(u) |u|^(1 + gamma), so gamma 0 leaves u unchanged.

    The paper divides by the standard deviation of the batch and not of the prompt, so SLAS needs `std: batch`, `global`
    or `update`; `std: group` and `none` are refused.
    """

    kind: Literal["slas"] = "slas"
    gamma: Annotated[float, Field(ge=0)] | Literal["adaptive"] = 0.5
    """How much faster than linearly large advantages grow. The paper's value is not known to us; try 0.25, 0.5 and 1.
    `adaptive` takes the largest gamma that `bound` allows. AdamW's updates have the same KL whatever gamma is (8.6e-6
    for 0, .5 and 1 on the embedded model), so gamma decides which images an update follows, not how far it goes."""
    order: Literal["norm_then_shape", "shape_then_norm"] = "norm_then_shape"
    """Whether advantages are divided by a deviation and then shaped, or afterwards also divided by the deviation of the
    shaped ones (`shape_then_norm`). Both keep their direction; `shape_then_norm` gives updates of one size whatever
    gamma is. The paper does not state the order."""
    recentre: bool = False
    """Whether the mean of each group's shaped advantages is subtracted, because a shaped group no longer sums to
    zero."""
    gamma_max: PositiveFloat = 2.0
    """The largest gamma that `adaptive` may choose."""
    bound: Literal["tail", "worst_case"] = "tail"
    """What limits an adaptive gamma. `tail` holds the moment of every update's advantages below the setting of that
    name, step by step. `worst_case` is the paper's inequality on the KL of a plain gradient step, from an estimate of
    the Fisher matrix: it exceeds the KL of real updates by orders of magnitude and keeps gamma at 0 on the embedded
    model (measured), which is the same as no shaping."""
    tail: Annotated[float, Field(ge=1)] = 2.0
    """The largest moment that an update's advantages may have with `bound: tail`: the mean of |u|^(2 + 2 gamma) with u
    scaled to mean square 1. It is 1 for linear advantages and rises with gamma and with the weight of the few largest
    ones. Normal advantages reach 2 at gamma .69, and those of configs/embedded_slas.yaml near .6 (measured)."""
    delta: PositiveFloat = 3e-5
    """The KL that an update may have with `bound: worst_case`, in nats per latent dimension."""
    refresh: PositiveInt = 10
    """The number of optimiser updates between two estimates with `bound: worst_case`. Each estimate costs extra passes
    through the network."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """The decay of the average over the estimates of gamma with `bound: worst_case`. 0 takes the last one."""

    @property
    def probes(self) -> bool:
        """Return whether the learner must estimate the Fisher matrix."""
        return self.gamma == "adaptive" and self.bound == "worst_case"

    def problems(self, where: str, run: Root) -> Iterator[str]:
        """Refuse a pool of another size than SLAS needs, advantages that overflow, and runs that gamma cannot adapt
        to."""
        if run.advantage.std in ("group", "none"):
            yield (
                f"{where} is slas, which takes the batch's deviation in place of the prompt's, and advantage.std is "
                f"{run.advantage.std}; set it to batch (or global)"
            )
        yield from self._overflow(where, run)
        if self.probes:
            if run.window is None:
                yield (
                    f"{where}.bound is worst_case, which needs log-probs, and algorithm.kind {run.algorithm.kind} has "
                    "none; set it to tail"
                )
            if self.order == "shape_then_norm":
                yield (
                    f"{where}.bound is worst_case, and {where}.order shape_then_norm gives updates of one size "
                    f"whatever gamma is; set order to norm_then_shape, or {where}.bound to tail"
                )
            if run.learner.zero_stage == 3:
                yield (
                    f"{where}.bound is worst_case, which needs whole parameters on every rank, and learner.zero_stage "
                    f"is 3; set it to 2, or {where}.bound to tail"
                )

    def _overflow(self, where: str, run: Root) -> Iterator[str]:
        """Refuse exponents that make a number without bounds of one image that beats all others of its step."""
        name, gamma = ("gamma_max", self.gamma_max) if self.gamma == "adaptive" else ("gamma", self.gamma)
        weights = 1.0 if run.advantage.rescale_weights else sum(abs(run.rewards[one].weight) for one in run.trained)
        # n rewards have no z-score above sqrt(n); `leave_one_out` doubles it at most.
        each = math.log10(2 * math.sqrt(run.images_per_step) * max(weights, 1.0))
        most = (MOST_CLIPPED if run.advantage.clip else MOST) / each - 1
        if gamma > most:
            yield (
                f"{where}.{name} is {gamma:g}, and the advantage of an image that beats all {run.images_per_step} of "
                f"its step would overflow; set it to at most {math.floor(most)} (.25 to 1 is usual)"
            )


def moment(u: np.ndarray, gamma: float) -> float:
    """Return the mean |u|^(2 (1 + gamma)) of linear advantages u, scaled to a mean square of 1.

    It never falls as gamma grows. Advantages that are all 0 have moment 0.
    """
    square = np.asarray(u, dtype=np.float64) ** 2
    mean = square.mean()
    return float(np.mean((square / mean) ** (1 + gamma))) if mean > 0 else 0.0


def largest_gamma(u: np.ndarray, bound: float, gamma_max: float, tol: float = 1e-6) -> float:
    """Return the largest gamma in [0, gamma_max] with moment(u, gamma) <= bound, less at most `tol`; 0 if none fits."""
    if moment(u, gamma_max) <= bound:
        return gamma_max
    low, high = 0.0, gamma_max
    while high - low > tol:
        middle = (low + high) / 2
        low, high = (middle, high) if moment(u, middle) <= bound else (low, middle)
    return low


def widest_gamma(updates: Sequence[np.ndarray], config: Slas) -> float:
    """Return the largest gamma with which every optimiser update's linear advantages keep their moment below `tail`.

    It is a function of the step alone: nothing is carried from step to step, so the bound holds in each of them.
    """
    return min((largest_gamma(u, config.tail, config.gamma_max) for u in updates), default=0.0)
