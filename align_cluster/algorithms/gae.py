"""Credit for each denoising step: returns and advantages from a critic's values. Pure functions, fp64."""

import numpy as np

from align_cluster.rewards.base import sound


def gae(values: np.ndarray, rewards: np.ndarray, discount: float = 1.0, decay: float = 0.95) -> np.ndarray:
    """Return generalised advantages (Schulman et al. 2015, arXiv 1506.02438, eq. 16) of rollouts with a final reward.

    values [..., N] belong to the states x_0 ... x_{N-1}. rewards [...] belong to the drawn images, which have value 0
    as states, so the last step pays the reward. The result is [..., N], and advantages + values are the returns that
    values regress on. decay 1 gives reward - value; decay 0 gives the next value minus this one.
    """
    advantages = np.zeros_like(values, dtype=np.float64)
    following, later = np.zeros_like(rewards, dtype=np.float64), np.zeros_like(rewards, dtype=np.float64)
    for k in reversed(range(values.shape[-1])):
        paid = rewards if k == values.shape[-1] - 1 else 0.0
        later = paid + discount * following - values[..., k] + discount * decay * later
        advantages[..., k], following = later, values[..., k]
    return advantages


def whiten(advantages: np.ndarray, valid: np.ndarray, clip: float) -> np.ndarray:
    """Return advantages [...] with mean 0 and deviation 1 over the valid ones, clipped to +- clip.

    `valid` is bool of the same shape. Invalid entries are 0, as are those that are not finite, and all are 0 if the
    valid ones do not vary. Where no valid entry is finite all are NaN, so that the update is skipped and counted.
    """
    finite = valid & sound(advantages)
    if valid.any() and not finite.any():
        return np.full_like(advantages, np.nan)
    valid, advantages = finite, np.where(finite, advantages, 0.0)
    chosen = advantages[valid]
    if not chosen.size or (spread := chosen.std()) < 1e-8:
        return np.zeros_like(advantages)
    return np.where(valid, np.clip((advantages - chosen.mean()) / spread, -clip, clip), 0.0)


def explained_variance(values: np.ndarray, rewards: np.ndarray) -> float:
    """Return 1 - Var(reward - value) / Var(reward), or NaN if rewards do not vary.

    It is 1 for a perfect critic, and 0 for one that predicts the mean.
    """
    spread = rewards.var()
    return float(1 - (rewards - values).var() / spread) if spread > 1e-12 else float("nan")


class RunningMoments:
    """Tracks the mean and deviation of one reward over a run's samples (Chan et al.'s parallel update)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def observe(self, values: np.ndarray) -> None:
        """Add values [n], but for those that are not finite: one of them would spoil all that come later."""
        values = values[sound(values)]
        if not len(values):
            return
        total, gap = self.count + len(values), values.mean() - self.mean
        self.squares += ((values - values.mean()) ** 2).sum() + gap**2 * self.count * len(values) / total
        self.mean += gap * len(values) / total
        self.count = total

    @property
    def deviation(self) -> float:
        """Return the standard deviation, or 1 until values vary."""
        spread = (self.squares / self.count) ** 0.5 if self.count else 0.0
        return spread if spread > 1e-8 else 1.0

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """Return (values - mean) / deviation."""
        return (values - self.mean) / self.deviation

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"count": self.count, "mean": float(self.mean), "squares": float(self.squares)}

    @classmethod
    def restored(cls, state: dict[str, float]) -> "RunningMoments":
        """Return moments that continue from `state()` of an earlier run."""
        moments = cls()
        moments.count, moments.mean, moments.squares = int(state["count"]), state["mean"], state["squares"]
        return moments
