"""Samples steered by a run's critic: its settings, the critic read back from the run's folder, and the drawing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from align_cluster.algorithms.gae import RunningMoments
from align_cluster.backbones.adapters import active_adapter, add_adapters
from align_cluster.backbones.base import CRITIC, CriticSection
from align_cluster.backbones.critic import Critic
from align_cluster.config.load import loads
from align_cluster.config.run import RunConfig, one_of
from align_cluster.errors import UserError
from align_cluster.files import read_json
from align_cluster.observe.rundir import RunDir
from align_cluster.rewards import REWARDS
from align_cluster.rewards.worker import RewardWorker
from align_cluster.rollouts.denoise import denoise
from align_cluster.rollouts.guidance import TextBatch, guided_velocity
from align_cluster.rollouts.sampler import Sampler
from align_cluster.rollouts.steering import BATCH, STEERING, Steering
from align_cluster.rollouts.steps import STEPS, Euler
from align_cluster.settings import Root, Section
from align_cluster.types import Chunk, Condition, Prompt

COMPUTE = {
    "actor": "actor passes",
    "critic": "critic passes",
    "critic_backward": "passes back through the critic",
    "images": "images decoded",
}


class SteerSettings(Root):
    """What --steer and --set steer.x=y say."""

    what: ClassVar[str] = "steering"
    sample: ClassVar[str] = "--steer best_of_n"

    steer: one_of(STEERING)


def read_settings(mode: str, overrides: Sequence[str]) -> Section:
    """Settings of a mode by its name and overrides such as steer.n=4."""
    return loads("{}", "--steer", [f"steer.kind={mode}", *overrides], SteerSettings).steer


def spent(compute: dict[str, int]) -> str:
    """Counts of `Steered.compute` for the terminal."""
    return ", ".join(f"{count} {COMPUTE[name]}" for name, count in compute.items() if count)


@dataclass(frozen=True)
class SavedCritic:
    """A run's critic: its rewards, what it is made of, the moments that its values are normalised with, its weights."""

    run: Path
    names: list[str]
    section: CriticSection
    moments: dict[str, RunningMoments]
    state: dict[str, torch.Tensor]

    @classmethod
    def read(cls, run: Path, config: RunConfig) -> "SavedCritic":
        """UserError where the run has none, or another than its settings say."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = RunDir(run).critic
        facts = read_json(folder / "critic.json")
        if facts is None:
            raise UserError(
                f"--steer needs a critic, and {run} has none; name the folder of a run that has finished and whose "
                "algorithm.kind is ppo"
            )
        names = config.trained
        if facts["rewards"] != names:
            raise UserError(
                f"the critic of {run} judges {' and '.join(facts['rewards'])}, and the rewards that are trained on are "
                f"{' and '.join(names)}; leave the rewards as they were in the run"
            )
        try:
            state = load_file(folder / "critic.safetensors")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{folder / 'critic.safetensors'} cannot be read ({error}); copy it from the run again"
            ) from None
        moments = {name: RunningMoments.restored(facts["moments"][name]) for name in names}
        return cls(run, names, CriticSection(**facts["critic"]), moments, state)

    def build(self, sampler: Sampler) -> Critic:
        """The critic beside a sampler's actor, on the same base and frozen."""
        denoiser, backbone = sampler.denoiser, sampler.backbone
        if self.section.features == "lora":
            with active_adapter(denoiser, "default"):  # which is the active one again thereafter
                add_adapters(backbone, denoiser, (CRITIC,))
        critic = Critic(backbone, denoiser, len(self.names), self.section)
        try:
            critic.restore(self.state)
        except ValueError as error:
            raise UserError(
                f"the critic of {self.run} does not fit ({error}); use it with the base model and the LoRA of its run"
            ) from None
        for parameter in [*denoiser.parameters(), *critic.trainable]:
            parameter.requires_grad_(False)
        return critic


class Steered:
    """Draws chunks, each one set of images that are steered together.

    `compute` counts passes through the networks, one a latent, and decoded images. `failures` say why a reward had no
    score by which to choose.
    """

    def __init__(
        self, settings: Section, saved: SavedCritic, config: RunConfig, sampler: Sampler, steps: int, guidance: float
    ) -> None:
        self.settings, self.saved, self.config, self.sampler = settings, saved, config, sampler
        self.steps, self.guidance, self.mode = steps, guidance, STEERING[settings.kind]
        self.step_kind = settings.step or (config.step_kind if self.mode.needs_noise else Euler.Config())
        weights = np.array([config.rewards[name].weight for name in saved.names])
        self.shares = weights / np.abs(weights).sum()
        self.branches = 1 if guidance == 1 else 2  # actor passes a step and latent
        self.compute = dict.fromkeys(COMPUTE, 0)
        self.failures: dict[str, str] = {}

    @cached_property
    def critic(self) -> Critic:
        return self.saved.build(self.sampler)

    @cached_property
    def sigmas(self) -> np.ndarray:
        return self.sampler.backbone.sigmas(self.steps)

    @property
    def tries(self) -> int | None:
        """Images that are begun for each one that is kept; None where all are kept, however many are drawn."""
        return getattr(self.settings, "n", None)

    def check(self, prompts: list[Prompt], scored: bool) -> None:
        """UserError where this cannot work. `scored`: whether the run's rewards judge."""
        prediction, kind = self.sampler.backbone.prediction, self.step_kind.kind
        able = [
            name
            for name, step in STEPS.items()
            if prediction in step.predictions and step.has_density >= self.mode.needs_noise and name != "dpm2"
        ]
        if kind not in able:
            why = "has no density, so copies of a particle would stay copies"
            if prediction not in STEPS[kind].predictions:
                why = f"is not for a network that predicts {prediction}"
            raise UserError(
                f"{self.settings.kind} cannot use steer.step.kind {kind}, which {why}; set it to {' or '.join(able)}"
            )
        kinds = [REWARDS[self.config.rewards[name].kind] for name in self.saved.names]
        unjudged = (one.text for one in prompts if not (scored and any(kind.judges(one) for kind in kinds)))
        if problems := list(self.mode.problems(self.settings, self.sigmas, next(unjudged, None))):
            raise UserError("\n".join(problems))

    @torch.no_grad()
    def draw(
        self, chunk: Chunk, condition: Condition, null: Condition | None, rewards: RewardWorker | None
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Images of a chunk that are kept [B, H, W, 3], and what is to be said of each."""
        backbone, denoiser = self.sampler.backbone, self.sampler.denoiser

        @cache
        def text(count: int) -> TextBatch:
            return TextBatch.build([condition] * count, null, backbone.device)

        def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            self.compute["actor"] += len(x) * self.branches
            return torch.cat(
                [
                    guided_velocity(backbone, denoiser, *part, text(len(part[0])), self.guidance)
                    for part in zip(x.split(BATCH), sigma.split(BATCH), strict=True)
                ]
            )

        def values(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return self.critic(x, sigma, text(len(x)).sequence, text(len(x)).pooled)

        step = STEPS[self.step_kind.kind](self.step_kind, self.sigmas, backbone.prediction)
        steering = self.mode(self.settings, step, values, self.shares, chunk.seeds)
        x0 = denoise(velocity, step, backbone.latent_shape, chunk.seeds, device=backbone.device, steer=steering).x0
        images = np.concatenate([backbone.decode(part) for part in x0.split(BATCH)])
        rows = steering.choose(self._rewards(images, chunk.prompt, rewards))
        self.compute["critic"] += steering.forwards
        self.compute["critic_backward"] += steering.backwards
        self.compute["images"] += len(images)
        return images[rows], [self._facts(steering, row, chunk) for row in rows]

    def report(self, images: int) -> dict[str, Any]:
        """Settings, and what was spent, beside plain sampling of as many images."""
        settings = self.settings.model_dump() | {"step": self.step_kind.model_dump()}
        plain = dict.fromkeys(COMPUTE, 0) | {"actor": images * self.steps * self.branches, "images": images}
        return {"settings": settings, "compute": self.compute, "plain": plain}

    def _rewards(self, images: np.ndarray, prompt: Prompt, rewards: RewardWorker | None) -> np.ndarray:
        """Normalised rewards [n, R] where there is a choice; NaN where a reward says nothing."""
        columns = np.full((len(images), len(self.saved.names)), np.nan)
        if rewards and self.tries and len(images) > 1:
            scores = rewards.score(images, [prompt] * len(images))
            self.failures |= {name: f"{one.kind}: {one.message}" for name, one in scores.failures.items()}
            for place, name in enumerate(self.saved.names):
                normal = self.saved.moments[name].normalise(scores.values[name])
                columns[:, place] = np.where(scores.valid[name], normal, np.nan)
        return columns

    def _facts(self, steering: Steering, row: int, chunk: Chunk) -> dict[str, Any]:
        """The seed, what the critic last expected of the image in the rewards' own units, and the mode's own facts."""
        facts: dict[str, Any] = {"seed": chunk.seeds[steering.origin[row]]} | steering.facts()
        heads = steering.heads[row]
        if np.isfinite(heads).all():
            moments = self.saved.moments.items()
            facts["expected"] = {
                name: one.mean + one.deviation * float(heads[i]) for i, (name, one) in enumerate(moments)
            }
        return facts
