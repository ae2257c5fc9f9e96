"""Turns scores and a critic's values into an advantage for each denoising step, by GAE over normalised rewards."""

from collections import deque

import numpy as np

from align_cluster.algorithms.advantage import usable
from align_cluster.algorithms.gae import RunningMoments, explained_variance, gae, whiten
from align_cluster.config.run import RunConfig
from align_cluster.files import write_text
from align_cluster.learner.batching import Reduced
from align_cluster.loop.learning import CriticValues
from align_cluster.loop.rollouts import DrawnChunk
from align_cluster.loop.state import write_critic
from align_cluster.observe.charts import Series, scatter_chart
from align_cluster.observe.rundir import RunDir
from align_cluster.rewards.base import sound
from align_cluster.rewards.mix import lost, table
from align_cluster.types import Credit

BUCKETS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.01))
SHOWN = 8  # steps whose values and rewards are drawn at the end
LOW = 0.5  # noise below which the warm-up asks what the critic explains


class CriticAdvantageEstimator:
    """Estimates advantages step by step. Its state, the rewards' `moments` and the warm-up's, goes into checkpoints."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.names = config.trained
        self.moments = {name: RunningMoments() for name in self.names}
        self.updates, self.warm = 0, config.algorithm.warm_up.updates == 0
        self.recent: deque[tuple[np.ndarray, np.ndarray, np.ndarray]] = deque(maxlen=SHOWN)

    def assign(self, drawn: list[DrawnChunk], found: CriticValues) -> Credit:
        """Return advantages [P, G, N] of a step from its scores and the critic's values."""
        values, sigmas = found.values.astype(np.float64), found.sigmas
        settings, scores = self.config.algorithm, [item.scores for item in drawn]
        rewards, applies, valid, weights = table(scores, self.config.rewards)
        shape = (self.config.prompts_per_step, self.config.group_members)
        valid = usable(rewards, applies, valid, weights)
        valid &= np.repeat(~lost(scores, self.config.rewards).reshape(shape).any(1), shape[1])
        normal = self._normalised(rewards, applies & valid)
        self._warm_up(values, normal, applies & valid, sigmas)
        decay = settings.decay if self.warm else 1.0  # while the actor waits, values regress on rewards alone
        raw = np.stack([gae(values[..., r], normal[r], settings.discount, decay) for r in range(len(weights))])
        judged = (applies & valid)[:, :, None]
        shares = np.abs(weights)[:, None, None] * judged
        total = (np.sign(weights)[:, None, None] * shares * raw).sum(0) / np.maximum(shares.sum(0), 1e-12)
        finite = valid & sound(total).all(1)  # the critic, too, may say what is no number
        valid = finite if finite.any() else valid
        steps = np.repeat(valid[:, None], total.shape[1], 1)
        advantages = whiten(total, steps, settings.advantage_clip)
        metrics = self._metrics(values, normal, applies & valid, sigmas) | {
            f"advantage/step/{k}": float(np.abs(total[valid, k]).mean()) for k in range(total.shape[1]) if valid.any()
        }
        self.recent.append((values, normal, applies & valid))
        returns = np.where(judged, raw, np.nan).transpose(1, 2, 0) + values
        metrics |= {"group/masked": 1.0 - float(valid.mean()), "value/actor": float(self.warm)}

        def grouped(array: np.ndarray) -> np.ndarray:
            return array.reshape(*shape, *array.shape[1:])

        return Credit(
            grouped(advantages).astype(np.float32),
            grouped(valid),
            metrics,
            grouped(returns).astype(np.float32),
            grouped(values).astype(np.float32),
            self.warm,
        )

    def observe(self, drawn: list[DrawnChunk], trained: dict[str, Reduced]) -> dict[str, float]:
        """Count updates; there is nothing to log of them."""
        self.updates += self.config.learner.updates_per_step
        return {}

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        moments = {name: moments.state() for name, moments in self.moments.items()}
        return {"moments": moments, "updates": self.updates, "warm": self.warm}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that a checkpoint keeps, from which the pictures at the end are drawn."""
        return {f"{i:02d}/{j}": array for i, item in enumerate(self.recent) for j, array in enumerate(item)}

    def restore(self, state: dict, arrays: dict[str, np.ndarray]) -> None:
        """Go on from the state of an earlier run."""
        self.moments = {name: RunningMoments.restored(state["moments"][name]) for name in self.names}
        self.updates, self.warm = state["updates"], state["warm"]
        self.recent.clear()
        for i in sorted({name.split("/")[0] for name in arrays}):
            self.recent.append(tuple(arrays[f"{i}/{j}"] for j in range(3)))

    def _normalised(self, rewards: np.ndarray, judged: np.ndarray) -> np.ndarray:
        """Normalise rewards [R, S] by the moments of all that the run has seen, these included; 0 where none is."""
        normal = np.zeros_like(rewards)
        for row, name in enumerate(self.names):
            self.moments[name].observe(rewards[row, judged[row]])
            normal[row, judged[row]] = self.moments[name].normalise(rewards[row, judged[row]])
        return normal

    def _warm_up(self, values: np.ndarray, normal: np.ndarray, judged: np.ndarray, sigmas: np.ndarray) -> None:
        settings = self.config.algorithm.warm_up
        low = sigmas[:-1] < LOW
        known = [
            explained_variance(values[judged[r]][:, low, r], np.repeat(normal[r, judged[r], None], low.sum(), 1))
            for r in range(len(normal))
        ]
        explains = low.any() and np.nanmin([*known, 1.0]) > settings.explained_variance and np.isfinite(known).any()
        self.warm = bool(self.warm or self.updates >= settings.updates or explains)

    def _metrics(
        self, values: np.ndarray, normal: np.ndarray, judged: np.ndarray, sigmas: np.ndarray
    ) -> dict[str, float]:
        found = {}
        for r, name in enumerate(self.names):
            said, paid = values[judged[r]][..., r], normal[r, judged[r]]
            if len(paid) < 2 or paid.std() == 0:
                continue
            found[f"value/{name}/explained_variance"] = explained_variance(said, paid[:, None].repeat(said.shape[1], 1))
            for low, high in BUCKETS:
                inside = (sigmas[:-1] >= low) & (sigmas[:-1] < high)
                if inside.any():
                    target = paid[:, None].repeat(inside.sum(), 1)
                    key = f"value/{name}/explained_variance/{low:g}-{min(high, 1):g}"
                    found[key] = explained_variance(said[:, inside], target)
            for k in range(said.shape[1]):
                if said[:, k].std() > 0:
                    found[f"value/{name}/correlation/{k}"] = float(np.corrcoef(said[:, k], paid)[0, 1])
        return found


def save_critic(
    run: RunDir, config: RunConfig, state: dict[str, np.ndarray], estimator: CriticAdvantageEstimator
) -> None:
    """Write the critic's weights, what its values mean, and pictures of how well it knew, into the run's folder."""
    write_critic(run.critic, config, state, estimator.state())
    for r, name in enumerate(estimator.names):
        write_text(run.critic / f"{name}.svg", scatter(name, r, list(estimator.recent)))


def scatter(name: str, r: int, recent: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> str:
    """Values of head `r` against the rewards that came, of the last steps: before the first denoising step and the
    last."""
    points: dict[int, list[tuple[float, float]]] = {0: [], -1: []}
    for values, normal, judged in recent:
        for k, found in points.items():
            found += zip(normal[r, judged[r]].tolist(), values[judged[r], k, r].tolist(), strict=True)
    series = [Series("of noise", points[0], "muted"), Series("before the last step", points[-1], "accent")]
    return scatter_chart(series, (460, 460), f"reward {name}, normalised", "value")
