"""Samples steered by a run's critic: the mode's settings, the critic read from the run's folder, and the drawing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from align_cluster.algorithms.gae import RunningMoments
from align_cluster.backbones.adapters import active_adapter, add_adapters
from align_cluster.backbones.base import CRITIC, CriticSection, LoraSettings
from align_cluster.backbones.critic import Critic
from align_cluster.config.load import loads
from align_cluster.config.run import RunConfig, one_of
from align_cluster.errors import UserError
from align_cluster.evaluate.local import ImagesAndFacts, LocalModel
from align_cluster.files import read_json
from align_cluster.observe.rundir import RunDir
from align_cluster.rewards import REWARDS
from align_cluster.rollouts.denoise import Path as Drawn
from align_cluster.rollouts.denoise import denoise
from align_cluster.rollouts.guidance import TextBatch, guided_velocity
from align_cluster.rollouts.sampler import Sampler
from align_cluster.rollouts.steering import BATCH, SINGLE_STEPS, STEERING, Steering
from align_cluster.rollouts.steps import STEPS, Euler
from align_cluster.settings import Root, Section
from align_cluster.types import Chunk, Prompt

# What steering spends, by its name in samples.json and its name on the terminal. A pass counts once for each latent.
COMPUTE = {
    "actor": "actor passes",
    "critic": "critic passes",
    "critic_backward": "passes back through the critic",
    "images": "images decoded",
}


class SteerSettings(Root):
    """Holds what --steer and --set steer.x=y say."""

    what: ClassVar[str] = "steering"
    sample: ClassVar[str] = "--steer best_of_n"

    steer: one_of(STEERING)


def read_settings(mode: str, overrides: Sequence[str]) -> Section:
    """Read the settings of a mode from its name and overrides such as steer.n=4."""
    return loads("{}", "--steer", [f"steer.kind={mode}", *overrides], SteerSettings).steer


def describe_compute(compute: dict[str, int]) -> str:
    """Describe the counts of `SteeredDrawing.compute` for the terminal."""
    return ", ".join(f"{number} {COMPUTE[name]}" for name, number in compute.items() if number)


class _Moments(BaseModel, allow_inf_nan=False):
    count: float
    mean: float
    squares: float


class _CriticFacts(BaseModel):
    """What critic.json must say; it says more, for people."""

    rewards: list[str]
    critic: CriticSection
    moments: dict[str, _Moments]


@dataclass(frozen=True)
class SavedCritic:
    """Holds the critic of a run, as the run left it; messages call the run `run`.

    `rewards` are the names of the rewards that it predicts, in the order of its outputs. `moments` normalise each of
    them. `section` and `state` are the critic's settings and weights, and `lora` configures its adapter.
    """

    run: Path
    rewards: list[str]
    section: CriticSection
    lora: LoraSettings
    moments: dict[str, RunningMoments]
    state: dict[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path, config: RunConfig, shown: Path | None = None) -> "SavedCritic":
        """Read the critic of a run's folder, which messages call `shown`, by default the folder.

        Raises UserError where there is none, or where it predicts other rewards than `config` trains on.
        """
        run, folder = shown or folder, RunDir(folder).critic
        content = read_json(folder / "critic.json")
        if content is None:
            raise UserError(
                f"--steer needs a critic, and {run} has none; name the folder of a run that has finished and whose "
                "algorithm.kind is ppo"
            )
        rewards = config.trained
        try:
            facts = _CriticFacts.model_validate(content)
            moments = {name: RunningMoments.restored(facts.moments[name].model_dump()) for name in facts.rewards}
        except (ValidationError, KeyError):
            raise UserError(f"{folder / 'critic.json'} is not what a run wrote; copy it from the run again") from None
        if facts.rewards != rewards:
            raise UserError(
                f"the critic of {run} judges {' and '.join(facts.rewards)}, and the rewards that are trained on are "
                f"{' and '.join(rewards)}; leave the rewards as they were in the run"
            )
        try:
            state = load_file(folder / "critic.safetensors")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{folder / 'critic.safetensors'} cannot be read ({error}); copy it from the run again"
            ) from None
        return cls(run, rewards, facts.critic, config.backbone.lora, moments, state)

    def build(self, sampler: Sampler) -> Critic:
        """Build the critic on the base model of a sampler, beside the actor's adapter, with all weights frozen."""
        denoiser, backbone = sampler.denoiser, sampler.backbone
        # The actor's scale is in its file's weights, and the critic's adapter has that of the run's settings.
        settings = backbone.config.model_copy(update={"lora": self.lora})
        backbone = type(backbone)(settings, str(backbone.device))
        if self.section.features == "lora":
            with active_adapter(denoiser, "default"):  # add_adapters activates what it adds; this restores the actor's
                add_adapters(backbone, denoiser, (CRITIC,))
        critic = Critic(backbone, denoiser, len(self.rewards), self.section)
        try:
            critic.restore(self.state)
        except ValueError as error:
            raise UserError(
                f"the critic of {self.run} does not fit ({error}); use it with the base model and the LoRA of its run"
            ) from None
        for parameter in [*denoiser.parameters(), *critic.trainable]:
            parameter.requires_grad_(False)
        return critic


class SteeredDrawing:
    """Draws chunks with a local model in one mode of steering; the members of a chunk are steered together.

    `compute` counts what was spent, by the names of COMPUTE.
    """

    def __init__(self, model: LocalModel, settings: Section, saved: SavedCritic) -> None:
        """Prepare the mode that `settings` name; the critic is built when it is first asked."""
        self.model, self.settings, self.saved = model, settings, saved
        self.mode, rewards = STEERING[settings.kind], model.config.rewards
        self.step_kind = settings.step or (model.config.step_kind if self.mode.needs_noise else Euler.Config())
        weights = np.array([rewards[name].weight for name in saved.rewards])
        self.shares = weights / np.abs(weights).sum()
        self.passes_a_step = 1 if model.guidance == 1 else 2  # through the actor, for each latent
        self.compute = dict.fromkeys(COMPUTE, 0)
        self.images_kept = 0

    @cached_property
    def critic(self) -> Critic:
        """The critic on the model's own network, built at first use."""
        return self.saved.build(self.model.sampler)

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Noise levels [N + 1] of the drawing."""
        return self.model.sampler.backbone.sigmas(self.model.steps)

    def check(self, prompts: list[Prompt]) -> None:
        """Raise UserError where the mode cannot work with its settings, this model and these prompts."""
        prediction, kind = self.model.sampler.backbone.prediction, self.step_kind.kind
        usable = [
            name
            for name, step in SINGLE_STEPS.items()
            if prediction in step.predictions and step.has_density >= self.mode.needs_noise
        ]
        if kind not in usable:
            why = "has no density, so copies of a particle would stay copies"
            if prediction not in STEPS[kind].predictions:
                why = f"is not for a network that predicts {prediction}"
            raise UserError(
                f"{self.settings.kind} cannot use steer.step.kind {kind}, which {why}; set it to {' or '.join(usable)}"
            )
        rewards = self.model.config.rewards
        kinds = [REWARDS[rewards[name].kind] for name in self.saved.rewards] if self.model.scored else []
        unjudged = (prompt.text for prompt in prompts if not any(kind.judges(prompt) for kind in kinds))
        if problems := list(self.mode.problems(self.settings, self.sigmas, next(unjudged, None))):
            raise UserError("\n".join(problems))

    @torch.no_grad()
    def draw(self, chunk: Chunk) -> ImagesAndFacts:
        """Draw a chunk of one prompt steered; return the images [B, H, W, 3] that the mode keeps, and their facts."""
        backbone, denoiser = self.model.sampler.backbone, self.model.sampler.denoiser
        prompt, null = chunk.rows[0].prompt, self.model.null
        condition = self.model.conditions[prompt.text]

        @cache
        def text(size: int) -> TextBatch:
            return TextBatch.build([condition] * size, null, backbone.device)

        def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            self.compute["actor"] += len(x) * self.passes_a_step
            parts = zip(x.split(BATCH), sigma.split(BATCH), strict=True)
            return torch.cat(
                [guided_velocity(backbone, denoiser, *part, text(len(part[0])), self.model.guidance) for part in parts]
            )

        def values(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return self.critic(x, sigma, text(len(x)).sequence, text(len(x)).pooled)

        step = STEPS[self.step_kind.kind](self.step_kind, self.sigmas, backbone.prediction)
        steering = self.mode(self.settings, step=step, value_function=values, shares=self.shares, seeds=chunk.seeds)
        x0 = denoise(velocity, step, backbone.latent_shape, chunk.seeds, device=backbone.device, steer=steering).x0
        decoded = [self.model.sampler.decoded(Drawn(part))[1:] for part in x0.split(BATCH)]
        images, finite = (np.concatenate(parts) for parts in zip(*decoded, strict=True))
        steering.values = np.where(finite[:, None], steering.values, np.nan)  # nothing speaks for a broken image
        if self.settings.tries and not finite.any():
            kept = [0]  # as good as any; its fact says what it is, as plain sampling's does
        else:
            kept = steering.choose(np.where(finite[:, None], self._rewards(images, prompt), np.nan))
        self.compute["critic"] += steering.forwards
        self.compute["critic_backward"] += steering.backwards
        self.compute["images"] += len(images)
        self.images_kept += len(kept)
        broken = {row: {"non_finite": True} for row in np.flatnonzero(~finite)}
        return images[kept], [self._facts(steering, row, chunk) | broken.get(row, {}) for row in kept]

    def report(self) -> dict[str, Any]:
        """Return the settings, what was spent, and what plain sampling of as many images would have cost."""
        settings = self.settings.model_dump() | {"step": self.step_kind.model_dump()}
        actor = self.images_kept * self.model.steps * self.passes_a_step
        plain = dict.fromkeys(COMPUTE, 0) | {"actor": actor, "images": self.images_kept}
        return {"settings": settings, "compute": self.compute, "plain": plain}

    def _rewards(self, images: np.ndarray, prompt: Prompt) -> np.ndarray:
        """Return the normalised rewards [n, R] of images among which to choose; NaN where a reward has no score."""
        columns = np.full((len(images), len(self.saved.rewards)), np.nan)
        if self.settings.tries and len(images) > 1 and (scores := self.model.score(images, [prompt] * len(images))):
            for index, name in enumerate(self.saved.rewards):
                normal = self.saved.moments[name].normalise(scores.values[name])
                columns[:, index] = np.where(scores.valid[name], normal, np.nan)
        return columns

    def _facts(self, steering: Steering, row: int, chunk: Chunk) -> dict[str, Any]:
        """Return the seed of a row, the critic's last prediction in the rewards' own units, and the mode's facts."""
        facts: dict[str, Any] = {"seed": chunk.seeds[steering.origin[row]]} | steering.facts()
        values = steering.values[row]
        if np.isfinite(values).all():
            moments = zip(self.saved.moments.items(), values, strict=True)
            facts["expected"] = {name: one.mean + one.deviation * float(value) for (name, one), value in moments}
        return facts
