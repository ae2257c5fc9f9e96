"""What can a critic know, and from how many images? Critics of the run file's kind learn from stored rollouts, as a run
learns from replayed states, and then judge states of held-out prompts. Run by critic.py."""

import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from common import commit, machine
from critic_data import branch, ceiling, parts, prompts_of, rewarded, settings

from align_cluster.algorithms.gae import explained_variance
from align_cluster.algorithms.ppo import PPO
from align_cluster.backbones import BACKBONES
from align_cluster.backbones.adapters import add_adapters
from align_cluster.backbones.base import CRITIC
from align_cluster.backbones.critic import Critic
from align_cluster.learner.batching import MetricSums
from align_cluster.learner.critic import CriticLearner
from align_cluster.learner.settings import OptimizerConfig
from align_cluster.rollouts.guidance import TextBatch
from align_cluster.types import Condition, ReplayBatch

MINIBATCH, UPDATES, LOOKS = 64, 300, 100  # states an update; updates between two looks at held-out states
JUDGED = 400  # held-out images, one a prompt
# name: settings of the critic beside those of the run file
ARMS = {
    "lora": {},
    "frozen": {"features": "frozen"},
    "whole": {"features": "whole"},
    "random": {"features": "whole", "init": "random"},
    "pixels": {"features": "pixels"},
    "no text": {"text": False},
    "no level": {"level": False},
}


RATES = {"whole": 3e-4, "random": 3e-4}  # AdamW's, where 1e-3 is too high: all weights of a network train
JOBS = (
    *("lora:2000", "decided:0", "lora:500", "lora:4000", "lora:8000", "lora:1000", "whole:4000", "pixels:4000"),
    *("frozen:4000", "no text:4000", "no level:4000", "random:4000"),
)


class Study:
    """Stored rollouts of `images` training prompts and of the held-out ones, and what trains on them."""

    def __init__(self, folder: Path, images: int, reward: str) -> None:
        torch.set_num_threads(1)
        self.config = settings()
        self.backbone = BACKBONES[self.config.backbone.kind](self.config.backbone)
        self.sigmas = self.backbone.sigmas(self.config.rollout.steps)
        self.states, self.rewards, self.texts = self._read(folder, "train", images, reward)
        self.held_states, self.held_rewards, self.held_texts = self._read(folder, "held_out", JUDGED, reward)
        self.mean, self.deviation = self.rewards.mean(), self.rewards.std()
        texts = list(dict.fromkeys([*self.texts, *self.held_texts]))
        self.conditions: dict[str, Condition] = dict(zip(texts, self.backbone.encode(texts), strict=True))

    def _read(self, folder: Path, split: str, images: int, reward: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
        files = [np.load(path, allow_pickle=False) for path in parts(split, folder)[: -(-images // 500)]]
        states = np.concatenate([file["states"][:, :-1] for file in files])[:images]
        scores = np.concatenate([file["scores"] for file in files])[:images]
        return states, rewarded(scores, reward), [prompt.text for prompt in prompts_of(self.config, split)[:images]]

    def learner(self, arm: str, rate: float, seed: int) -> CriticLearner:
        section = self.config.algorithm.critic.model_copy(update=ARMS[arm])
        adapters = ("default", CRITIC) if section.features == "lora" else ("default",)
        actor = add_adapters(self.backbone, self.backbone.load_denoiser(), adapters)
        algorithm = PPO(self.config.algorithm.model_copy(update={"critic": section, "critic_lr": rate}))
        critic = Critic(self.backbone, actor, 1, section, seed)
        return CriticLearner(critic, algorithm, OptimizerConfig(weight_decay=self.config.optimizer.weight_decay), 1)

    def batch(self, rng: np.random.Generator) -> ReplayBatch:
        rows, places = (rng.integers(count, size=MINIBATCH) for count in self.states.shape[:2])
        targets = ((self.rewards[rows] - self.mean) / self.deviation).astype(np.float32)[:, None]
        levels = self.sigmas[places].astype(np.float32)
        return ReplayBatch(self.states[rows, places], levels, targets, tuple(self.texts[i] for i in rows), MINIBATCH)

    @torch.no_grad()
    def values(self, critic: Critic) -> np.ndarray:
        """Values [images, N] of held-out states, in units of the reward."""
        found = np.zeros(self.held_states.shape[:2])
        for first in range(0, len(found), 50):
            rows = range(first, min(first + 50, len(found)))
            text = TextBatch.build([self.conditions[self.held_texts[i]] for i in rows], None, self.backbone.device)
            for k in range(found.shape[1]):
                x = torch.from_numpy(self.held_states[rows, k].astype(np.float32))
                level = torch.full((len(x),), float(self.sigmas[k]))
                found[rows, k] = critic(x, level, text.sequence, text.pooled)[:, 0]
        return self.mean + self.deviation * found


def learn(
    folder: Path, arm: str, images: int, reward: str = "mixed", updates: int = UPDATES, rate: float = 0, seed: int = 0
) -> dict:
    """Train one critic; the row says what it explained by noise level at each look. Rate 0 takes the arm's own."""
    rate = rate or RATES.get(arm, 1e-3)
    study = Study(folder, images, reward)
    learner, rng, curve = study.learner(arm, rate, seed), np.random.default_rng(seed), []
    low, started = study.sigmas[:-1] < 0.5, time.process_time()
    for update in range(1, updates + 1):
        learner.replay([study.batch(rng)], study.conditions, MetricSums())
        if update % LOOKS == 0 or update == updates:
            values, paid = study.values(learner.critic), study.held_rewards
            levels = [explained_variance(values[:, k], paid) for k in range(values.shape[1])]
            whole = explained_variance(values[:, low], np.repeat(paid[:, None], low.sum(), 1))
            curve.append({"update": update, "low": whole, "levels": levels})
            print(f"{arm} {images} {update}: {whole:.3f}, {np.round(levels, 2)}", flush=True)
    facts = {"arm": arm, "images": images, "reward": reward, "updates": updates, "rate": rate, "seed": seed}
    return row(facts, study.sigmas, round(time.process_time() - started), curve)


def decided(folder: Path) -> dict:
    """What a critic could explain at most: the share of the reward's variance that the state decides."""
    started = time.process_time()
    levels = ceiling(rewarded(branch(folder), "mixed"))
    config = settings()
    sigmas = BACKBONES[config.backbone.kind](config.backbone).sigmas(config.rollout.steps)
    curve = [{"update": 0, "low": float(levels[sigmas[:-1] < 0.5].mean()), "levels": levels.tolist()}]
    facts = {"arm": "decided", "images": 0, "reward": "mixed", "updates": 0}
    return row(facts, sigmas, round(time.process_time() - started), curve)


def row(facts: dict, sigmas: np.ndarray, seconds: int, curve: list[dict]) -> dict:
    where = {"date": date.today().isoformat(), "commit": commit(), "machine": machine()}
    return facts | where | {"sigmas": sigmas[:-1].tolist(), "cpu_seconds": seconds, "curve": curve}
