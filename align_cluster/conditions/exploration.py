"""Settings of E2PO, and how strongly perturbed conditions act at each noise level."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from align_cluster.settings import Root, Section
from align_cluster.streams import hashed

Level = TypeVar("Level", float, np.ndarray, torch.Tensor)


class E2po(Section):
    """Configures E2PO. Defaults are the paper's, except lr, init, bound and embedding, which it does not state."""

    # Settings that have no part in what is learned of a prompt.
    drawing: ClassVar[frozenset[str]] = frozenset({"rho", "schedule", "clock", "update", "learned"})

    kind: Literal["e2po"] = "e2po"
    conditions: PositiveInt = 4
    """The number K of conditions that each noise is drawn under, the original one included. The paper has 12 with 4
    noises (dense), 4 with 2 (efficient) and 3 with 8 (preference rewards); 1 explores nothing."""
    anchor: bool = True
    """Whether the original condition is one of the K. false draws all of them under perturbed conditions, so that a
    group has no reference; the paper finds this slower and biased. It needs `conditions` of 2 or more."""
    encoders: Literal["first", "both"] = "first"
    """Which CLIP text encoders are perturbed: CLIP-L alone, or also CLIP-G, which learns variants of its own
    (kind sd3). The paper reports that runs with both are unstable and collapse."""
    schedule: Literal["fading", "static"] = "fading"
    """Whether perturbed conditions fade out as `rho` says, or act at all noise levels (`static`), where the paper finds
    artefacts in images."""
    rho: Annotated[float, Field(gt=0, le=1)] = 0.4
    """The share of the clock, from the noisiest level on, over which perturbed conditions fade out linearly into the
    original one. The paper uses 0.4; on the embedded model, whose levels are not shifted, 0.8 is as strong. `static`
    does not read it."""
    clock: Literal["sigma", "time"] = "sigma"
    """What `rho` is a share of: noise levels (`sigma`), or denoising steps, of which step k of N begins at 1 - k / N
    (`time`). The paper says normalised sampling time. With SD3's shifted levels sigma lasts longer: its weights over 10
    steps sum to 4.1, those of time to 2.5. The clock that the authors mean is not public."""
    update: Literal["original", "perturbed"] = "original"
    """The condition that the learner predicts under: the prompt's own, or the one that an image was drawn under, at the
    strength of the trained noise level (`perturbed`, an ablation of the paper). `perturbed` needs kind nft."""
    learned: Literal["once", "each_time"] = "once"
    """Whether a prompt keeps its perturbations for the whole run, or learns new ones, from another start, in each step
    that draws it. `each_time` costs phase 1 in every step. The paper does not say which it does."""
    mu: Annotated[float, Field(ge=-1, le=1)] = 0.8
    """The cosine to the original embedding that perturbed ones are held at."""
    margin: Annotated[float, Field(ge=0)] = 0.01
    """How far a cosine may be from mu without any loss."""
    diversity: Annotated[float, Field(ge=0)] = 50.0
    """The weight of the mean cosine between perturbed embeddings in the loss; a single one is compared with the
    original. The paper compares 30, 50 and 100."""
    iterations: PositiveInt = 300
    """The number of AdamW steps that learn the perturbations of a prompt."""
    lr: PositiveFloat = 1e-3
    """The learning rate of these steps."""
    init: PositiveFloat = 0.01
    """The standard deviation of the perturbations that learning starts from."""
    bound: Literal["token_l2", "inf", "grad_norm"] = "token_l2"
    """What `radius` limits: the L2 norm of each token's perturbation (`token_l2`), each of its elements (`inf`), or the
    norm of the gradient of a prompt's perturbations (`grad_norm`). The paper says max-norm clip, which may mean any of
    them."""
    radius: PositiveFloat = 0.05
    """The limit that `bound` names. It keeps perturbed embeddings near the original."""
    embedding: Literal["projected", "pooled"] = "projected"
    """Whether cosines compare projected embeddings or the pooled ones before the projection. A CLIP without a
    projection has only the latter."""

    @property
    def variants(self) -> int:
        """Return the number of perturbed conditions of a prompt."""
        return self.conditions - self.anchor

    def seed_in(self, seed: int, step: int) -> int:
        """Return the seed that a run with `seed` learns perturbations from in a step."""
        return seed if self.learned == "once" else hashed(f"{seed}/{step}")

    def problems(self, where: str, run: Root) -> Iterator[str]:
        """Refuse groups without a second condition, and a clock that nothing reads."""
        if not self.anchor and self.conditions < 2:
            yield (
                f"{where}.anchor is false, and {where}.conditions is 1, which leaves a group nothing to compare; "
                f"set {where}.conditions to 2 or more, or anchor to true"
            )
        if self.schedule == "static" and self.clock != "sigma":
            yield (
                f"{where}.clock is {self.clock}, and {where}.schedule static reads no clock; leave clock out, or set "
                "schedule to fading"
            )


def gamma(sigma: Level, rho: float) -> Level:
    """Return the weight of the perturbed condition at noise level sigma: linear from 1 at sigma = 1 to 0 at 1 - rho."""
    weight = 1 - (1 - sigma) / rho
    return weight.clamp(0, 1) if isinstance(weight, torch.Tensor) else np.clip(weight, 0, 1)


def strength(sigma: float, levels: np.ndarray, config: E2po) -> float:
    """Return the weight of the perturbed condition at noise level sigma of a rollout with `levels` [N + 1], falling.

    By the clock of time, levels stand at 1, 1 - 1/N, ..., 0, and what lies between two of them between their times.
    """
    if config.schedule == "static":
        return 1.0
    if config.clock == "time":
        sigma = float(np.interp(sigma, levels[::-1], np.linspace(0, 1, len(levels))))
    return float(gamma(sigma, config.rho))
