"""Turns scores and a critic's values into an advantage for each denoising step, by GAE over normalised rewards.

It also says what the critic learns from, and when it knows enough for the actor to begin.
"""

from collections import deque

import numpy as np

from align_cluster.algorithms.advantage import usable
from align_cluster.algorithms.gae import RunningMoments, explained_variance, gae, whiten
from align_cluster.config.run import RunConfig
from align_cluster.files import write_text
from align_cluster.learner.batching import Reduced
from align_cluster.learner.state import under
from align_cluster.loop.learning import CriticValues
from align_cluster.loop.replay import Block, ReplayBuffer
from align_cluster.loop.rollouts import DrawnChunk
from align_cluster.loop.state import write_critic
from align_cluster.observe.charts import Series, scatter_chart
from align_cluster.observe.rundir import RunDir
from align_cluster.rewards.base import sound
from align_cluster.rewards.mix import lost, table
from align_cluster.streams import hashed
from align_cluster.types import Credit, ReplayBatch

BUCKETS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.01))
SHOWN = 8  # steps whose values and rewards are kept: they are drawn at the end, and the warm-up reads the last ones
LOW = 0.5  # noise below which the warm-up asks what the critic explains


class CriticAdvantageEstimator:
    """Estimates advantages step by step, and keeps what the critic learns from. Its state goes into checkpoints."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.names = config.trained
        self.moments = {name: RunningMoments() for name in self.names}
        self.updates, self.warm = 0, config.algorithm.warm_up.updates == 0
        self.replay = ReplayBuffer(config) if config.algorithm.replay.images else None
        self.recent: deque[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = deque(maxlen=SHOWN)

    def assign(self, drawn: list[DrawnChunk], found: CriticValues) -> Credit:
        """Return advantages [P, G, N] of a step from its scores and the critic's values."""
        values, sigmas = found.values.astype(np.float64), found.sigmas
        settings, scores = self.config.algorithm, [item.scores for item in drawn]
        rewards, applies, valid, weights = table(scores, self.config.rewards)
        shape = (self.config.prompts_per_step, self.config.group_members)
        valid = usable(rewards, applies, valid, weights)
        valid &= np.repeat(~lost(scores, self.config.rewards).reshape(shape).any(1), shape[1])
        normal = self._normalised(rewards, applies & valid)
        prompts = [prompt.text for item in drawn for prompt in item.chunk.prompts]
        held = np.array([held_out(text, settings.critic_held_out) for text in prompts])
        self.recent.append((values, normal, applies & valid, held))
        known = self._known(sigmas)
        self._warm_up(known)
        decay = settings.decay if self.warm else 1.0  # while the actor waits, values regress on rewards alone
        raw = np.stack([gae(values[..., r], normal[r], settings.discount, decay) for r in range(len(weights))])
        judged = (applies & valid)[:, :, None]
        shares = np.abs(weights)[:, None, None] * judged
        total = (np.sign(weights)[:, None, None] * shares * raw).sum(0) / np.maximum(shares.sum(0), 1e-12)
        finite = valid & sound(total).all(1)  # the critic, too, may say what is no number
        valid = finite if finite.any() else valid
        advantages = whiten(total, self._trained(valid, found), settings.advantage_clip)
        metrics = self._metrics(values, normal, applies & valid, sigmas) | {
            f"advantage/step/{k}": float(np.abs(total[valid, k]).mean()) for k in range(total.shape[1]) if valid.any()
        }
        metrics |= {f"value/{name}/held_out": ev for name, ev in known.items() if np.isfinite(ev)}
        metrics |= {"group/masked": 1.0 - float(valid.mean()), "value/actor": float(self.warm)}

        def grouped(array: np.ndarray) -> np.ndarray:
            return array.reshape(*shape, *array.shape[1:])

        learned = {}
        if self.replay is None:
            returns = np.where(judged & ~held[:, None], raw, np.nan).transpose(1, 2, 0) + values
            learned = {"returns": grouped(returns).astype(np.float32), "values": grouped(values).astype(np.float32)}
        else:
            kept = np.where(applies & valid & ~held, rewards, np.nan).T
            learned["replay"] = self._replay(drawn, found, kept, prompts)
            metrics |= {"value/replay/images": len(self.replay), "value/replay/updates": len(learned["replay"])}
            if len(self.replay):
                metrics["value/replay/age"] = self.replay.age
        return Credit(grouped(advantages).astype(np.float32), grouped(valid), metrics, actor=self.warm, **learned)

    def _replay(
        self, drawn: list[DrawnChunk], found: CriticValues, rewards: np.ndarray, prompts: list[str]
    ) -> tuple[ReplayBatch, ...]:
        """Keep the step's images with their rewards [S, R]; return what the critic's updates read."""
        versions = np.repeat([item.info.version for item in drawn], [len(item.chunk) for item in drawn])
        self.replay.add(Block.of(found.kept, found.places, rewards, versions, prompts))
        moments = [self.moments[name] for name in self.names]
        mean, deviation = (np.array([getattr(item, part) for item in moments]) for part in ("mean", "deviation"))
        return self.replay.minibatches(drawn[0].chunk.step, found.sigmas, mean, deviation)

    def _trained(self, valid: np.ndarray, found: CriticValues) -> np.ndarray:
        """Return as bool [S, N] which denoising steps of which samples train the actor."""
        trained = np.zeros(found.values.shape[1], bool)
        trained[slice(None) if found.slots is None else list(found.slots)] = True
        return valid[:, None] & trained

    def observe(self, drawn: list[DrawnChunk], trained: dict[str, Reduced]) -> dict[str, float]:
        """Count the critic's updates; there is nothing to log of them."""
        self.updates += self.config.algorithm.critic_updates(self.config.images_per_step)
        return {}

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        moments = {name: moments.state() for name, moments in self.moments.items()}
        return {"moments": moments, "updates": self.updates, "warm": self.warm}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that a checkpoint keeps: what is replayed, and the last values and rewards."""
        recent = {f"recent/{i:02d}/{j}": array for i, item in enumerate(self.recent) for j, array in enumerate(item)}
        replayed = {} if self.replay is None else self.replay.arrays()
        return recent | {f"replay/{name}": array for name, array in replayed.items()}

    def restore(self, state: dict, arrays: dict[str, np.ndarray]) -> None:
        """Go on from the state of an earlier run."""
        self.moments = {name: RunningMoments.restored(state["moments"][name]) for name in self.names}
        self.updates, self.warm = state["updates"], state["warm"]
        recent = under("recent/", arrays)
        self.recent.clear()
        for i in sorted({name.split("/")[0] for name in recent}):
            self.recent.append(tuple(recent[f"{i}/{j}"] for j in range(4)))
        if self.replay is not None:
            self.replay.restore(under("replay/", arrays))

    def _normalised(self, rewards: np.ndarray, judged: np.ndarray) -> np.ndarray:
        """Normalise rewards [R, S] by the moments of all that the run has seen, these included; 0 where none is."""
        normal = np.zeros_like(rewards)
        for row, name in enumerate(self.names):
            self.moments[name].observe(rewards[row, judged[row]])
            normal[row, judged[row]] = self.moments[name].normalise(rewards[row, judged[row]])
        return normal

    def _known(self, sigmas: np.ndarray) -> dict[str, float]:
        """Return the share of each reward's variance that the critic explained at low noise, on the held-out prompts of
        the last steps together. NaN where there are not enough steps yet, or where rewards do not vary."""
        count, low = self.config.algorithm.warm_up.steps, sigmas[:-1] < LOW
        found = dict.fromkeys(self.names, float("nan"))
        if len(self.recent) < count or not low.any():
            return found
        for r, name in enumerate(self.names):
            said, paid = [], []
            for values, normal, judged, held in list(self.recent)[-count:]:
                rows = judged[r] & held
                said.append(values[rows][:, low, r])
                paid.append(np.repeat(normal[r, rows, None], low.sum(), 1))
            if sum(map(len, paid)) > 1:
                found[name] = explained_variance(np.concatenate(said), np.concatenate(paid))
        return found

    def _warm_up(self, known: dict[str, float]) -> None:
        settings = self.config.algorithm.warm_up
        explains = all(share > settings.explained_variance for share in known.values())  # False for NaN
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


def held_out(text: str, share: float) -> bool:
    """Return whether the critic never trains on a prompt; a share of all prompts are so, the same in every run."""
    return hashed(f"held out of the critic: {text}") < share * 2**64


def scatter(name: str, r: int, recent: list[tuple[np.ndarray, ...]]) -> str:
    """Values of head `r` against the rewards that came, of the last steps: before the first denoising step and the
    last."""
    points: dict[int, list[tuple[float, float]]] = {0: [], -1: []}
    for values, normal, judged, _ in recent:
        for k, found in points.items():
            found += zip(normal[r, judged[r]].tolist(), values[judged[r], k, r].tolist(), strict=True)
    series = [Series("of noise", points[0], "muted"), Series("before the last step", points[-1], "accent")]
    return scatter_chart(series, (460, 460), f"reward {name}, normalised", "value")
