"""Rollouts of the frozen embedded model for the study of what a critic can know: states, scores, and the branching
ceiling. Drawn once, in parts; what is missing can be drawn later. Run by critic.py."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from align_cluster.config.load import load
from align_cluster.config.run import RunConfig
from align_cluster.loop.requests import training_request
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.groups import spread
from align_cluster.rewards.worker import RewardWorker
from align_cluster.rollouts.denoise import initial_noise, path_generators
from align_cluster.rollouts.guidance import TextBatch
from align_cluster.rollouts.sampler import Sampler
from align_cluster.rollouts.steps import STEPS
from align_cluster.types import Chunk, Prompt, Row

TRAINED, HELD_OUT, PART, BATCH = 8000, 1000, 500, 50
ROOTS, BRANCHES = 40, 8  # held-out states whose futures are drawn again, and how often
COLUMNS = ("accuracy", "strict", "graded", "clip")  # of the scores [images, 4]


def settings() -> RunConfig:
    return load(Path(__file__).parent.parent / "configs" / "embedded_critic.yaml", ["cluster.threads=1"])


class Drawing:
    """The embedded model's sampler and rewards, with the run file's way to draw."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.sampler = config, Sampler(config.backbone)
        self.rewards = RewardWorker(dict(config.rewards))
        self.request = training_request(config, 0, 0)
        self.step = STEPS[config.step_kind.kind](config.step_kind, self.sampler.sigmas(self.request), "flow")

    def scores(self, images: np.ndarray, prompts: list[Prompt]) -> np.ndarray:
        found = self.rewards.score(images, prompts)
        columns = [*(found.details[f"geneval/{name}"] for name in COLUMNS[:3]), found.values["clip"]]
        return np.stack(columns, 1)

    def rollout(self, prompts: list[Prompt], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """States before each step and final latents, fp16 [B, N + 1, C, H, W], and scores [B, 4]."""
        rows = [Row(prompt, i, 0, seed, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
        chunk = Chunk(0, 0, tuple(rows))
        conditions = dict(zip(chunk.texts, self.sampler.encode(chunk.texts), strict=True))
        _, images, record = self.sampler.draw(chunk, conditions, None, self.request)
        states = np.concatenate([record.before, record.x0[:, None]], 1).astype(np.float16)
        return states, self.scores(images, prompts)

    @torch.no_grad()
    def branches(self, prompts: list[Prompt], states: np.ndarray, k: int) -> np.ndarray:
        """Scores [B, BRANCHES, 4] of images that the rollouts could still become from states [B, C, H, W] of step k."""
        conditions = self.sampler.encode([prompt.text for prompt in prompts])
        text = TextBatch.build(conditions, None, self.sampler.backbone.device)
        found = []
        for branch in range(BRANCHES):
            generators = path_generators([10**6 * (k + 1) + 100 * i + branch for i in range(len(prompts))])
            x = torch.from_numpy(states.astype(np.float32))
            for j in range(k, len(self.step.sigmas) - 1):
                level = self.step.fed(torch.full((len(x),), j))
                v = self.sampler.backbone.velocity(self.sampler.denoiser, x, level, text.sequence, text.pooled)
                x = self.step.advance(
                    j, x, v, initial_noise(generators, x.shape[1:]) if self.step.is_noisy(j) else None
                )
            found.append(self.scores(self.sampler.backbone.decode(x), prompts))
        return np.stack(found, 1)


def prompts_of(config: RunConfig, split: str) -> list[Prompt]:
    """One prompt an image: TRAINED as a run would draw them, or half of HELD_OUT different ones, each twice."""
    rng = np.random.default_rng(0)
    if split == "train":
        found = PROMPTS[config.prompts.kind](config.prompts).load()
        return [found[i] for i in rng.permutation(len(found))[:TRAINED]]
    found = spread(PROMPTS[config.evaluate.prompts.kind](config.evaluate.prompts).load(), HELD_OUT // 2)
    return [found[i] for i in rng.permutation(HELD_OUT // 2)] * 2


def parts(split: str, folder: Path) -> list[Path]:
    count = {"train": TRAINED, "held_out": HELD_OUT}[split]
    return [folder / f"{split}_{first:05d}.npz" for first in range(0, count, PART)]


def draw(folder: Path, images: int = TRAINED) -> Iterator[str]:
    """Draw what is missing of the held-out images and of so many of the others; yields a line a part."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    config = settings()
    drawing = Drawing(config)
    for offset, split in enumerate(("held_out", "train")):
        prompts = prompts_of(config, split)
        for number, path in enumerate(parts(split, folder)):
            if path.exists() or (split == "train" and number * PART >= images):
                continue
            states, scores = [], []
            for first in range(number * PART, (number + 1) * PART, BATCH):
                own = list(range(first, first + BATCH))
                drawn = drawing.rollout([prompts[i] for i in own], [10**7 * (offset + 1) + i for i in own])
                states.append(drawn[0]), scores.append(drawn[1])
            save(path, states=np.concatenate(states), scores=np.concatenate(scores))
            yield f"{path.name}: mean scores {np.concatenate(scores).mean(0).round(3)}"


def branch(folder: Path) -> np.ndarray:
    """Scores [roots, N, BRANCHES, 4] of the futures of held-out states, drawn unless they are there."""
    path = folder / "branches.npz"
    if not path.exists():
        drawing, config = Drawing(settings()), settings()
        roots = np.load(parts("held_out", folder)[0], allow_pickle=False)["states"][:ROOTS]
        prompts = prompts_of(config, "held_out")[:ROOTS]
        found = [drawing.branches(prompts, roots[:, k], k) for k in range(roots.shape[1] - 1)]
        save(path, scores=np.stack(found, 1))
    return np.load(path, allow_pickle=False)["scores"]


def save(path: Path, **arrays: np.ndarray) -> None:
    with path.with_suffix(".part").open("wb") as file:
        np.savez(file, **arrays)
    path.with_suffix(".part").rename(path)


def ceiling(scores: np.ndarray) -> np.ndarray:
    """Share of the variance [N] that the state decides, from a score [roots, N, branches]: what the variance within a
    state's futures leaves of that of all."""
    within = scores.var(2, ddof=1).mean(0)
    return 1 - within / scores.transpose(1, 0, 2).reshape(scores.shape[1], -1).var(1)


def rewarded(scores: np.ndarray, reward: str) -> np.ndarray:
    """A column of scores [..., 4], or the run file's own reward "mixed"."""
    return scores[..., [0, 2]].mean(-1) if reward == "mixed" else scores[..., COLUMNS.index(reward)]
