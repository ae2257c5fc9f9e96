"""SRPO (Shen et al. 2025, arXiv 2509.06942): the gradient of a relative reward into the denoiser at any noise level.

The reward is relative to two control words in the text. Constants are those of the official code, which differs from
the paper's text in places.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from align_cluster.algorithms.base import REWARD, SATISFIED, Algorithm, Batch, Policy
from align_cluster.algorithms.reward_gradient import margin_problems, recover
from align_cluster.backbones.noising import noised
from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import DifferentiableReward
from align_cluster.rewards.words import Template, Vocabulary, split, worded
from align_cluster.rollouts.denoise import initial_noise, starting_noise
from align_cluster.rollouts.steps import whole_thousandths
from align_cluster.settings import Root, Section
from align_cluster.types import Metric

LEVELS, EDGE = 1000, 5  # levels are numbered from 1 (clean) to 1000 (noisy); the 5 at each end are not trained
# The official script lists "Natural-lighting" and "Concept art" first, but counts steps from 1, so it begins with the
# second word of each list. These lists begin there.
POSITIVE = ("Detail", "Detailed", "Real", "Natural-lighting")
NEGATIVE = ("Painting", "Anime", "Flat", "Oil", "Concept art")

Level = Annotated[float, Field(gt=0, lt=1)]
Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


def doubtful(phrase: str, known: Vocabulary | None) -> str | None:
    """Say which word of a control phrase a tokenizer does not know; None where it knows all.

    Without the tokenizer the published words pass.
    """
    published = sorted({word for one in (*POSITIVE, *NEGATIVE) for word in split(one)})
    words = split(phrase)
    strange = [word for word in words if not (known.knows(word) if known else word in published)]
    if not strange:
        return None
    near = known.nearest(strange[0]) if known else next(iter(get_close_matches(strange[0], published, n=1)), None)
    hint = f"; the nearest that {'it knows' if known else 'is published'} is {near!r}" if near else ""
    if known:
        return f"knows {len(words) - len(strange)} of {len(words)} words, and not {strange[0]!r}{hint}"
    return f"is not on this machine, so whether it knows {strange[0]!r} is not known{hint}"


class SRPO(Algorithm):
    """SRPO: adds the initial noise to x0 again, recovers x0 in one short step, and follows a relative reward.

    The recovery is Direct-Align's. The relative reward compares the image under a positive and a negative control word.
    Inner passes alternate between a step that denoises and one that inverts, with the words in opposite roles. Both
    recover at the same level, or at its neighbour near the clean end, so what the reward likes under any words has
    opposite signs in the two passes.
    """

    class Config(Section):
        """Configures SRPO. In a step that inverts, the positive and the negative score change places."""

        kind: Literal["srpo"] = "srpo"
        relative: Literal["words", "noise", "none"] = "words"
        """What a reward is relative to. `words` compares an image under two control words; `noise` compares it with a
        slightly noised copy, for rewards that read no text. `none` follows the reward itself, which is plain
        Direct-Align."""
        form: Literal["released", "difference", "cfg"] = "released"
        """How the positive score r+ and the negative score r- are weighed. `released` is (1 + k) r+ - r-, with k from
        the discounts below; the official code has it, and the authors found it more stable. `difference` is r+ - r-
        (paper, eq. 10), and `cfg` is k r+ + (1 - k) r- with k from `strength` (paper, eq. 11)."""
        strength: Annotated[float, Field(gt=1)] = 1.5
        """The factor k of `form: cfg`. Other forms do not read it."""
        positive: Words = POSITIVE
        """The control words that the model moves towards. They are taken in turn, one for each optimiser update, from
        the first one on. The official script takes these in this order."""
        negative: Words = NEGATIVE
        """The control words that the model moves away from, taken in turn as well. The official script takes these in
        this order."""
        template: Template = "{word}. {prompt}"
        """The text that a reward reads: {word} stands for the control word, and {prompt} for the prompt."""
        blur: Level = 0.1
        """The noise level of the copy that `relative: noise` compares with, from 0 to 1."""
        branches: Literal["both", "denoise", "inversion"] = "both"
        """Which steps an update makes: one that denoises, one that inverts, or both. With `both`, what the reward likes
        under any words pulls in opposite directions. With `relative: none` it must be denoise."""
        levels: tuple[Level, Level] = (27 / 28, 0.75)
        """The noisiest and the cleanest noise level; one between them is drawn for each sample. The default is the
        official script's for HPS; the one for PickScore ends at 2/3. Above 0.99 the authors saw distorted images."""
        gap: Annotated[int, Field(ge=1, le=500)] = 100
        """The largest step that the model makes, in thousandths of the range of `levels`. The official code uses
        100."""
        injections: PositiveInt = 1
        """The number of consecutive levels, one step of `gap` apart, to which the same x0 is noised (paper, eq. 6).
        Each costs another pass for every branch. The official code uses 1."""
        discount_denoise: tuple[float, float] = (0.1, 0.25)
        """The factor k of `form: released` in a step that denoises, at the cleanest and at the noisiest level; it is
        linear between them. The default is the official script's for HPS; the one for PickScore has 0.1 and 0.5. Too
        high a factor gives over-saturated images."""
        discount_inversion: tuple[float, float] = (0.3, 0.01)
        """The factor k of `form: released` in a step that inverts, at the cleanest and at the noisiest level. The
        default is the official script's for HPS; the one for PickScore has 0.6 and 0.01."""
        late: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
        """The weight lambda(t) of a sample's loss at the cleanest and at the noisiest level (paper, eq. 6); it is
        linear between them. The official code uses 1 everywhere."""
        margin: float | None = 0.7
        """The reward, relative or not, from which on a sample has no gradient; null gives all samples one. 0.7 is the
        official code's and belongs to HPS's scale."""
        truncate_timesteps: bool = True
        """Whether updates feed a flow network with noise levels cut to thousandths, int(1000 sigma) / 1000, as the
        official code does. Rollouts have rollout.step.truncate_timesteps."""

        @field_validator("levels")
        @classmethod
        def noisy_first(cls, levels: tuple[float, float]) -> tuple[float, float]:
            """Refuse levels in ascending order."""
            if levels[0] <= levels[1]:
                raise ValueError("[noisiest, cleanest], the first above the second")
            return levels

        @field_validator("injections")
        @classmethod
        def fit_the_range(cls, injections: int, info: ValidationInfo) -> int:
            """Refuse more injections than steps of `gap` fit between the levels."""
            most = 1 + (LEVELS - 2 * EDGE) // info.data.get("gap", 100)
            if injections > most:
                raise ValueError(f"at most {most}: so many steps of algorithm.gap fit between the levels")
            return injections

        def problems(self, where: str, run: Root) -> Iterator[str]:
            """Refuse words for rewards that read none, and what plain Direct-Align cannot learn from."""
            for name in run.trained if self.relative == "words" else ():
                kind = run.rewards[name].kind
                if issubclass(REWARDS[kind], DifferentiableReward) and not REWARDS[kind].reads_text:
                    yield (
                        f"rewards.{name} is of kind {kind}, which reads no text, and {where}.relative words compares "
                        f"an image under two texts; set {where}.relative to noise or none"
                    )
            if self.relative == "none" and self.branches != "denoise":
                yield (
                    f"{where}.branches is {self.branches}, and without words or noise to compare with an inverting "
                    "step would lower the reward; set it to denoise"
                )
            if self.relative == "none":
                yield from margin_problems(self.margin, where, run)

        def notes(self, where: str, run: Root) -> Iterator[str]:
            """Note levels that distort images, and control words that a reward's tokenizer does not know."""
            if self.levels[0] > 0.99:
                yield f"{where}.levels begins at {self.levels[0]:g}: above .99 the authors saw distorted images"
            for name in run.trained if self.relative == "words" else ():
                known = REWARDS[run.rewards[name].kind](run.rewards[name]).vocabulary()
                for setting, phrases in (("positive", self.positive), ("negative", self.negative)):
                    for phrase in phrases:
                        if doubt := doubtful(phrase, known):
                            yield f"{where}.{setting}: {phrase!r}: the tokenizer of rewards.{name} {doubt}"

    needs_density = False
    reward_gradient = True
    offline = True
    default_step = "euler"
    behaviour = "default"
    adapters = ("default",)
    metrics = (
        REWARD,
        SATISFIED,
        Metric(
            "train/preference", "score", "SRPO: score under the positive control word less that under the negative one"
        ),
        Metric("train/recovery", "", "SRPO: RMS distance of the recovered x0 from the true one"),
    )

    @property
    def branches(self) -> tuple[str, ...]:
        """Return the branches that the inner passes alternate between."""
        return ("denoise", "inversion") if self.config.branches == "both" else (self.config.branches,)

    def inner_passes(self, steps: int, recorded: int) -> int:
        """Each injection takes one pass for each branch."""
        return len(self.branches) * self.config.injections

    def level(self, number: torch.Tensor) -> torch.Tensor:
        """Return the noise levels fp32 of level numbers from 1 (cleanest) to LEVELS (noisiest)."""
        return torch.from_numpy(np.linspace(*self.config.levels, LEVELS)).float()[LEVELS - number]

    def numbers(self, batch: Batch, injection: torch.Tensor) -> torch.Tensor:
        """Return the level number that each visit is about, the same in both branches; `injection` is [b]."""
        low, high = EDGE + (self.config.injections - 1) * self.config.gap, LEVELS - EDGE
        streams = batch.generators("level", shared=True)
        drawn = [int(torch.randint(low, high + 1, (1,), generator=stream)) for stream in streams]
        return torch.tensor(drawn) - injection * self.config.gap

    def places(self, number: torch.Tensor, inverts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the level numbers from which each visit steps and at which it recovers x0; `inverts` is bool [b].

        A step that denoises recovers at `number`. So does one that inverts, unless `number` is at most `gap`: it then
        starts from level 1, and its step of min(gap, number) levels ends at number + 1, as in the official code.
        """
        gap = torch.minimum(number, LEVELS - number).clamp(max=self.config.gap)
        below = (number - gap).clamp(min=1)
        return torch.where(inverts, below, number + gap), torch.where(inverts, below + gap, number)

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss is minus the weighted scores of the recovered image, or their gap to `margin`."""
        config, x0, device = self.config, batch.x0, batch.x0.device
        passes, prediction = torch.tensor(batch.passes), policy.step.prediction
        inverts = torch.tensor([branch == "inversion" for branch in self.branches])[passes % len(self.branches)]
        number = self.numbers(batch, passes // len(self.branches))
        start, end = self.places(number, inverts)
        level, target = self.level(start).to(device), self.level(end).to(device)
        fed = whole_thousandths(level) if config.truncate_timesteps and prediction == "flow" else level
        noise = starting_noise(batch.noises, x0.shape[1:]).to(device)
        x = noised(x0, noise, level, prediction)
        found = recover(x, policy.velocity(x, fed), noise, level, target, prediction)
        scores = self.scores(policy, batch, found)
        reward = (scores * self.weights(torch.where(inverts, start, number), inverts).to(scores)).sum(1)
        loss = -reward if config.margin is None else torch.relu(config.margin - reward)
        share = (number - 1) / (LEVELS - 1)
        loss = loss * (config.late[0] + (config.late[1] - config.late[0]) * share).to(loss)
        metrics = {"reward": reward, "recovery": (found - x0).square().flatten(1).mean(1).sqrt()}
        if config.margin is not None:
            metrics["satisfied"] = (reward >= config.margin).float()
        if config.relative != "none":
            metrics["preference"] = scores[:, 0] - scores[:, 1]
        return loss, {name: values.detach() for name, values in metrics.items()}

    def pair(self, update: int, prompt: str) -> list[str]:
        """Return the texts of optimiser update `update`: the prompt with a positive word, and with a negative one."""
        words = (self.config.positive, self.config.negative)
        chosen = (options[update % len(options)] for options in words)
        return [worded(self.config.template, word, prompt) for word in chosen]

    def scores(self, policy: Policy, batch: Batch, x0: torch.Tensor) -> torch.Tensor:
        """Return rewards [b, 2], positive then negative, or [b, 1] of the image alone."""
        if self.config.relative == "words":
            return policy.rewards(x0, [self.pair(batch.update, text) for text in batch.prompts])
        own = [[text] for text in batch.prompts]
        plain = policy.rewards(x0, own)
        if self.config.relative == "none":
            return plain
        noise = initial_noise(batch.generators("blur"), x0.shape[1:]).to(x0)
        blurred = noised(x0, noise, torch.full((len(x0),), self.config.blur), policy.step.prediction)
        return torch.cat([plain, policy.rewards(blurred, own)], 1)

    def weights(self, number: torch.Tensor, inverts: torch.Tensor) -> torch.Tensor:
        """Return the weights [b, J] of `scores`; the level number [b] decides the discount, `inverts` is bool [b]."""
        config, one = self.config, torch.ones(len(number))
        if config.relative == "none":
            return one[:, None]
        if config.form == "difference":
            pair = (one, -one)
        elif config.form == "cfg":
            pair = (one * config.strength, one * (1 - config.strength))
        else:
            inversion, denoising = (
                torch.from_numpy(np.linspace(*ends, LEVELS)).float()[number]
                for ends in (config.discount_inversion, config.discount_denoise)
            )
            pair = (1 + torch.where(inverts, inversion, denoising), -one)
        weights = torch.stack(pair, 1)
        return torch.where(inverts[:, None], weights.flip(1), weights)
