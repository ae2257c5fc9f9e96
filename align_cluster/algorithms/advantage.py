"""Advantages: pure functions of all rewards of a step, in fp64.

Letters: R trained rewards, P prompt groups, M members a group. `valid` [P, M] is False if a trained reward failed: that
sample counts in no statistic and gets 0. So does a sample with a score that is not finite, or above MOST. `applies` [R,
P, M] is False if a reward does not judge that prompt. `batches` int [P, M], from 0 up, is the number of the optimiser
update that a sample belongs to.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import PositiveFloat

from align_cluster.algorithms.slas import Slas, moment, widest_gamma
from align_cluster.rewards.base import MOST, sound
from align_cluster.settings import Root, Section
from align_cluster.types import Credit

FLAT = 1e-6  # a group with a smaller range of rewards carries no signal
FEWEST = 4  # groups whose common deviation says more than that of one prompt


class AdvantageConfig(Section):
    """Configures how rewards become advantages."""

    mean: Literal["group", "leave_one_out", "global"] = "group"
    """What a reward is compared with: the mean of its group, the mean of the others in its group (`leave_one_out`), or
    the mean of the whole step (`global`). Flow-GRPO, DanceGRPO and DiffusionNFT take the group's."""
    std: Literal["group", "global", "batch", "update", "none"] = "group"
    """What the distance from that mean is divided by: the standard deviation of the group (`group`: DanceGRPO), of the
    whole step (`global`: Flow-GRPO, DiffusionNFT; `batch`: the same, as SLAS calls the batch that DanceGRPO gathers),
    of the optimiser update alone (`update`), or nothing (`none`: Dr. GRPO). SLAS needs `batch`, `global` or `update`.
    `batch` and `update` need four groups or more: over fewer, they come close to `group`."""
    std_of: Literal["raw", "centred"] = "raw"
    """Whether `global`, `batch` and `update` take the deviation of raw rewards, differences between prompts included,
    or of rewards less the mean that they are compared with (`centred`). Flow-GRPO takes raw ones."""
    ddof: Literal[0, 1] = 0
    """What a deviation's sum of squares over n rewards is divided by: n with 0 (Flow-GRPO), n - 1 with 1
    (DanceGRPO)."""
    eps: PositiveFloat = 1e-4
    """The number that is added to a deviation before an advantage is divided by it. Flow-GRPO and DiffusionNFT use
    1e-4, DanceGRPO 1e-8."""
    mix: Literal["sum_then_normalise", "normalise_then_sum", "gdpo"] = "sum_then_normalise"
    """How several rewards become one advantage. `sum_then_normalise` takes their weighted sum first, so the one with
    the widest range dominates (Flow-GRPO, DiffusionNFT). `normalise_then_sum` normalises each one first and scales the
    weights of those that apply to sum to 1 (MixGRPO); `gdpo` then takes a z-score over each update (Flow-Factory)."""
    rescale_weights: bool = True
    """Whether `normalise_then_sum` and `gdpo` scale the weights of the rewards that apply to sum to 1. false takes them
    as given, as DanceGRPO does: its weights .7 and 1.4 make advantages 2.1 times as large, so that more of them reach
    the clip. `sum_then_normalise` never scales them."""
    shaping: Slas | None = None
    """Super-linear shaping of advantages (SLAS). Null leaves them linear."""
    clip: PositiveFloat | None = None
    """The bound on |advantage| after shaping. Null sets none here; grpo and nft clip by algorithm.advantage_clip as
    well."""

    def problems(self, where: str, run: Root) -> Iterator[str]:
        """Refuse statistics over too few groups or parts of groups, and weights that nothing scales."""
        if not self.rescale_weights and self.mix == "sum_then_normalise":
            yield (
                f"{where}.rescale_weights is false, and {where}.mix sum_then_normalise never scales weights; leave it "
                f"out, or set {where}.mix to normalise_then_sum"
            )
        groups, updates = run.prompts_per_step, run.learner.updates_per_step
        each, enough = groups // updates, groups >= FEWEST
        if (self.std == "batch" or (self.shaping and self.std == "global")) and not enough:
            yield (
                f"{where}.std is {self.std}, and a step has {groups} groups, whose common deviation is close to that "
                f"of one prompt; set prompts_per_step to at least {FEWEST}"
            )
        remedy = f"learner.updates_per_step to at most {groups // FEWEST}"
        if not enough:
            remedy = f"prompts_per_step to at least {FEWEST} and learner.updates_per_step to 1"
        for pooled, used, other in (
            ("std is update", self.std == "update", "std to batch" if enough else "std to group"),
            ("mix is gdpo", self.mix == "gdpo", "mix to normalise_then_sum"),
        ):
            if used and each < FEWEST:
                yield (
                    f"{where}.{pooled}, and learner.updates_per_step {updates} leaves an update {each} of the {groups} "
                    "groups of a step, whose common deviation is close to that of one prompt; "
                    f"set {remedy}, or {where}.{other}"
                )


def normalise(rewards: np.ndarray, valid: np.ndarray, config: AdvantageConfig, batches: np.ndarray) -> np.ndarray:
    """Return advantages [P, M] of one reward [P, M]: centred, then divided by a deviation.

    Groups that are flat (max - min < 1e-6) or have fewer than two valid rewards get exactly 0, whatever `mean` is.
    """
    valid = valid & sound(rewards)
    r = np.where(valid, rewards, 0.0).astype(np.float64)
    mean, count = _mean(r, valid, _pool("global" if config.mean == "global" else "group", batches))
    centred = np.where(valid, r - mean, 0.0)
    if config.mean == "leave_one_out":
        centred *= count / np.maximum(count - 1, 1)
    of_centred = config.std_of == "centred" and config.std != "group"
    scaled = _divide(centred, centred if of_centred else r, valid, config, batches)
    return np.where(_live(r, valid)[:, None], scaled, 0.0)


def linear(
    values: np.ndarray,
    applies: np.ndarray,
    valid: np.ndarray,
    weights: np.ndarray,
    config: AdvantageConfig,
    batches: np.ndarray,
) -> np.ndarray:
    """Return advantages [P, M] of rewards [R, P, M] with weights [R], before shaping and clip."""
    scored = applies & usable(values, applies, valid, weights)
    if config.mix == "sum_then_normalise":
        return normalise(_weighted_sum(values, scored, weights), scored.any(0), config, batches)
    each = np.stack([normalise(r, ok, config, batches) for r, ok in zip(values, scored, strict=True)])
    share = weights[:, None, None] * scored
    size = np.abs(share).sum(0) if config.rescale_weights else 1.0
    mixed = (share * each).sum(0) / np.where(size > 0, size, 1.0)
    if config.mix == "normalise_then_sum":
        return mixed
    ok, pool = scored.any(0), _pool("update", batches)
    z = (mixed - _mean(mixed, ok, pool)[0]) / (_std(mixed, ok, pool, config.ddof) + config.eps)
    return np.where(ok & (mixed != 0).any(1, keepdims=True), z, 0.0)  # the batch's mean must not move flat groups


def shape(u: np.ndarray, valid: np.ndarray, config: AdvantageConfig, batches: np.ndarray, gamma: float) -> np.ndarray:
    """Return SLAS of linear advantages u [P, M]; u is 0 where not valid, and a group of zeros stays exactly 0.

    `shape_then_norm` also starts from u and not from centred rewards. The two differ by a deviation, which cancels in
    the second division, and `eps` then never swallows rewards of a narrow range.
    """
    shaped = np.sign(u) * np.abs(u) ** (1 + gamma)
    if config.shaping.recentre:
        shaped = np.where(valid, shaped - _mean(shaped, valid, _pool("group", batches))[0], 0.0)
    if config.shaping.order == "shape_then_norm":
        shaped = _divide(shaped, shaped, valid, config, batches)
    return shaped


def credit(
    values: np.ndarray,
    applies: np.ndarray,
    valid: np.ndarray,
    weights: np.ndarray,
    config: AdvantageConfig,
    batches: np.ndarray,
    conditions: int = 1,
    gamma: float | None = None,
    anchor: bool = True,
) -> Credit:
    """Return the advantages of one step, with metrics to log.

    Members are laid out by `conditions` K: m = k * G + g, and with `anchor` k = 0 is the original prompt. `gamma`
    replaces the settings' value; an adaptive gamma with `bound: worst_case` needs it.
    """
    valid = usable(values, applies, valid, weights) & applies.any(0)
    advantages = linear(values, applies, valid, weights, config, batches)
    total = _weighted_sum(values, applies & valid, weights)
    metrics = _spreads(total, valid, conditions, anchor) | {
        "group/zero_std_ratio": 1.0 - float((advantages != 0).any(1).mean()),
        "group/masked": 1.0 - float(valid.mean()),
    }
    if config.shaping:
        updates = [advantages[valid & (batches == number)] for number in np.unique(batches[valid])]
        if gamma is None:
            gamma = config.shaping.gamma
            gamma = widest_gamma(updates, config.shaping) if gamma == "adaptive" else gamma
        metrics["advantage/gamma"] = float(gamma)
        metrics["advantage/moment"] = max((moment(u, gamma) for u in updates), default=0.0)
        advantages = shape(advantages, valid, config, batches, gamma)
    if config.clip:
        advantages = np.clip(advantages, -config.clip, config.clip)
    if config.shaping:
        metrics["advantage/sum"] = float(np.abs(advantages.sum(1)).mean())
    metrics["advantage/abs_mean"] = _average(np.abs(advantages), valid)
    return Credit(advantages.astype(np.float32), valid, metrics)


def usable(values: np.ndarray, applies: np.ndarray, valid: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return which valid samples [...] have sound scores [R, ...] by all rewards that judge them."""
    largest = np.maximum(np.abs(weights), 1.0).reshape(-1, *[1] * valid.ndim)
    return valid & (~applies | (np.abs(values) <= MOST / largest)).all(0)


def _weighted_sum(values: np.ndarray, scored: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (weights[:, None, None] * np.where(scored, values, 0.0)).sum(0)


def _live(rewards: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return which groups [P] carry a signal: they have two valid rewards that differ by 1e-6 or more."""
    high = np.where(valid, rewards, -np.inf).max(1)
    low = np.where(valid, rewards, np.inf).min(1)
    return high - low >= FLAT


def _divide(
    values: np.ndarray, of: np.ndarray, valid: np.ndarray, config: AdvantageConfig, batches: np.ndarray
) -> np.ndarray:
    if config.std == "none":
        return values
    return values / (_std(of, valid, _pool(config.std, batches), config.ddof) + config.eps)


def _pool(kind: str, batches: np.ndarray) -> np.ndarray:
    """Return labels [P, M]; statistics are taken over the samples of each label."""
    if kind == "update":
        return batches
    return np.broadcast_to(np.arange(len(batches))[:, None] if kind == "group" else 0, batches.shape)


def _mean(x: np.ndarray, valid: np.ndarray, pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of the valid entries with the same label, and their number: both [P, M]."""
    labels = pool.ravel()
    count = np.bincount(labels, valid.ravel())[pool]
    return np.bincount(labels, np.where(valid, x, 0.0).ravel())[pool] / np.maximum(count, 1), count


def _std(x: np.ndarray, valid: np.ndarray, pool: np.ndarray, ddof: int) -> np.ndarray:
    square, count = _mean((x - _mean(x, valid, pool)[0]) ** 2, valid, pool)
    return np.sqrt(square * count / np.maximum(count - ddof, 1))


def _average(x: np.ndarray, valid: np.ndarray) -> float:
    return float(x[valid].mean()) if valid.any() else float("nan")


def spread(x: np.ndarray, valid: np.ndarray, axis: int = 1) -> float:
    """Return the mean deviation along an axis of [P, M], over slices with two valid entries; NaN without any."""
    count = valid.sum(axis, keepdims=True)
    mean = np.where(valid, x, 0.0).sum(axis, keepdims=True) / np.maximum(count, 1)
    square = np.where(valid, (x - mean) ** 2, 0.0).sum(axis, keepdims=True) / np.maximum(count, 1)
    return _average(np.sqrt(square), count > 1)


def _spreads(total: np.ndarray, valid: np.ndarray, conditions: int, anchor: bool) -> dict[str, float]:
    """Return where the combined reward [P, M] varies: in groups, across noises, and across conditions.

    With several conditions, original and perturbed members are also reported apart.
    """
    metrics = {"group/reward_std_mean": spread(total, valid)}
    if conditions == 1:
        return metrics
    grid, ok = (x.reshape(len(x), conditions, -1) for x in (total, valid))
    metrics["group/std_across_noises"] = spread(grid, ok, 2)
    metrics["group/std_across_conditions"] = spread(grid, ok, 1)
    original = total.shape[1] // conditions if anchor else 0
    kinds = [("original", slice(0, original))] * anchor + [("perturbed", slice(original, None))]
    for name, rows in kinds:
        metrics[f"group/{name}_std"] = spread(total[:, rows], valid[:, rows])
        metrics[f"group/{name}_mean"] = _average(total[:, rows], valid[:, rows])
    return metrics
