"""SGP: which of two control words fits an image better, SRPO's measure of realism (arXiv 2509.06942, table 1)."""

from typing import Literal

import numpy as np
import torch
from pydantic import PositiveFloat, field_validator

from align_cluster.kinds import one_of
from align_cluster.rewards.base import Bounds, ModelSize, Result, Reward, RewardSection
from align_cluster.rewards.clip_score import ClipScore
from align_cluster.rewards.hps import Hps
from align_cluster.rewards.open_clip_score import OpenClipScore
from align_cluster.rewards.pickscore import PickScore
from align_cluster.rewards.words import Template, worded
from align_cluster.types import Prompt

JUDGES = {"hps": Hps, "pickscore": PickScore, "clip_score": ClipScore, "open_clip_score": OpenClipScore}


class Sgp(Reward):
    """Measures which of two texts fits an image better: the cosine under the positive less that under the negative.

    Its detail `share` is the softmax of the two. The paper speaks of a difference and prints .41 to .51, which no
    difference of such cosines is, so both are reported.
    """

    class Config(RewardSection):
        """Configures SGP, which SRPO reports and does not train on: give it role monitor to do the same."""

        kind: Literal["sgp"] = "sgp"
        of: one_of(JUDGES) = Hps.Config()
        """The reward whose CLIP model judges: hps, pickscore, clip_score or open_clip_score. Only its model matters, so
        its weight, role and the like must be left out. SRPO's tables judge by HPS v2.1."""
        positive: str = "Realistic photo"
        """The control word that a realistic image should fit. The default is SRPO's."""
        negative: str = "CG Render"
        """The control word that a realistic image should not fit. The default is SRPO's."""
        template: Template = "{word}. {prompt}"
        """The text under which an image is judged. It contains {word} and {prompt} once each."""
        temperature: PositiveFloat = 100.0
        """The factor of the cosines in the softmax of the detail `share`; the score itself has none. The paper does not
        say how it scales its numbers. 100 is CLIP's learned temperature."""

        @field_validator("of")
        @classmethod
        def says_a_model_only(cls, of: RewardSection) -> RewardSection:
            """Refuse weight, role and the like inside `of`, where they would have no effect."""
            for name in RewardSection.model_fields:  # a run's config.yaml has them all, at their defaults
                if getattr(of, name) != getattr(RewardSection(), name):
                    raise ValueError(f"without {name}, which is to stand beside `of` and not in it")
            return of

    @property
    def bounds(self) -> Bounds:
        """Those of a difference of two cosines."""
        return -2.0, 2.0

    def model_sizes(self) -> list[ModelSize | None]:
        """Return the sizes of the model that judges."""
        return JUDGES[self.config.of.kind](self.config.of).model_sizes()

    def load(self, device: str, threads: int) -> None:
        """Load the judging reward."""
        self.judge = JUDGES[self.config.of.kind](self.config.of)
        self.judge.load(device, threads)

    @torch.no_grad()
    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Result:
        """Judge each image under the prompt with the positive and with the negative text."""
        pixels = torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2)
        words = (self.config.positive, self.config.negative)
        pairs = [[worded(self.config.template, word, prompt.text) for word in words] for prompt in prompts]
        cosines = self.judge.against(pixels, pairs) / self.judge.factor
        gaps = cosines.double() @ torch.tensor([1.0, -1.0]).double().to(cosines.device)
        shares = torch.sigmoid(self.config.temperature * gaps)
        return Result(gaps.cpu().numpy(), np.ones(len(prompts), dtype=bool), {"share": shares.cpu().numpy()})
