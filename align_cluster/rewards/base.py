"""The contract of a reward: a pure function of (image, prompt), with a validity mask."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator
from torch.nn import functional as F

from align_cluster.prompts.files import check_record
from align_cluster.rewards.words import Vocabulary
from align_cluster.settings import Section
from align_cluster.types import Failure, FailureKind, Prompt

Bounds = tuple[float | None, float | None]
MOST = 1e30  # largest magnitude of a score, weighted or not: squares stay far inside fp64, and advantages inside fp32


def sound(values: np.ndarray) -> np.ndarray:
    """Return which numbers can be computed with: they are finite and at most MOST."""
    return np.abs(values) <= MOST  # False for NaN


class FailurePolicy(Section):
    """Configures what happens if scoring fails. A monitor's failures are only counted."""

    retries: Annotated[int, Field(ge=0, le=20)] = 2
    """The number of further tries after a failed one. Out of memory halves the batch first, and an image that cannot be
    read is never tried again. As many other workers may try a batch whose worker was lost or late."""
    backoff_s: Annotated[float, Field(ge=0)] = 0.5
    """The seconds before the first retry. Each later retry waits twice as long as the one before."""
    timeout_s: PositiveFloat = 300.0
    """The seconds that a worker has for one batch, retries included; a worker over them is replaced. Rewards that share
    workers add up their times. Raise it for a slow model or a large batch."""
    then: Literal["mask", "drop_group", "fail"] = "mask"
    """What happens to images that still have no score: `mask` leaves them out of the statistics, `drop_group` leaves
    out all images of their prompt, and `fail` ends the run."""
    stop_after: PositiveInt | None = 3
    """The number of training steps in a row without any score, because all images failed, after which the run ends. It
    also ends where its first evaluation has none. null goes on without the reward."""


class PoolSection(Section):
    """Configures workers that score only this reward."""

    workers: PositiveInt = 1
    """The number of workers. Raise it where training waits for this reward; the metric scoring/<name>/queue shows how
    many images wait."""
    max_workers: PositiveInt | None = None
    """The most workers while images wait. One more starts when over four batches a worker wait and the cluster has
    room, and it ends after a draw that did not need it. null means `workers`, so the number is fixed."""
    cpus: PositiveFloat | None = None
    """The CPU cores that each worker takes; a fraction is fine. null gives it an equal share of the cores that samplers
    and learners leave."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """The GPUs that each worker takes; 0 scores on the CPU. Workers with less than 0.5 share GPUs with samplers, and
    the others have GPUs of their own, which training then lacks."""
    batch: PositiveInt | None = None
    """The number of images that are scored together. null takes one chunk, `rollout.chunk` images. Raise it where a GPU
    is not busy, and lower it where its memory is short."""
    batching: Literal["ordered", "dynamic"] = "ordered"
    """How batches are made: `ordered` takes consecutive chunks of the step, so that a score is the same in every run.
    `dynamic` takes whatever waits and never waits for a late chunk, but the last bits of a score then depend on
    timing."""
    pip: tuple[str, ...] = ()
    """The requirements, such as "open_clip_torch", that Ray installs for these workers alone. Use it for a reward whose
    packages conflict with those of the run."""

    @field_validator("max_workers")
    @classmethod
    def not_below_the_minimum(cls, count: int | None, info: ValidationInfo) -> int | None:
        """Refuse `max_workers` below `workers`."""
        if count is not None and count < info.data.get("workers", 1):
            raise ValueError(f"at least workers, {info.data['workers']}")
        return count


class RewardSection(Section):
    """Holds the settings that every reward shares."""

    weight: float = 1.0
    """The weight of this reward among all trained ones. With `advantage.mix: sum_then_normalise` it multiplies the raw
    score, so a reward with a wide range needs a small weight. A monitor's weight has no effect."""
    role: Literal["train", "monitor"] = "train"
    """Whether the run trains on this reward (`train`) or only scores and reports it (`monitor`). A monitor shows
    whether a run improves what it is not paid for."""
    on_failure: FailurePolicy = FailurePolicy()
    """What happens where scoring fails."""
    pool: PoolSection | None = None
    """Workers that score only this reward, in parallel to the others. null scores it on the workers of
    `cluster.reward_workers`, which run on CPUs and score their rewards one after the other. A large model needs a pool
    with `gpus`."""


class RewardError(Exception):
    """A reward raises this if it knows the kind of its failure.

    Any other error counts as model_error, unless it is a lack of memory, a timeout or a lost connection.
    """

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind


@dataclass(frozen=True)
class Result:
    """Holds the scores of B images by one reward.

    values    fp64 [B], higher is better, NaN where not valid
    valid     bool [B], False if the reward does not apply to the prompt
    details   more columns for reports, fp64 [B] by name, NaN where a column does not apply
    failure   the rows that the reward could not score, which are not valid, and why
    """

    values: np.ndarray
    valid: np.ndarray
    details: dict[str, np.ndarray] = field(default_factory=dict)
    failure: Failure | None = None


def malformed(prompts: Sequence[Prompt], fields: Sequence[str]) -> Failure | None:
    """Return the failure of prompts whose metadata breaks the format of a record in one of these fields; None where
    none does. What rewards read came from a file, from a request, or from a caller."""
    wrong = {}
    for row, prompt in enumerate(prompts):
        try:
            check_record({name: prompt.metadata[name] for name in fields if prompt.metadata.get(name) is not None})
        except ValueError as error:
            wrong[row] = f"metadata of {prompt.text[:80]!r}: {error}"
    return Failure("bad_input", next(iter(wrong.values())), tuple(wrong)) if wrong else None


@dataclass(frozen=True)
class ModelSize:
    """The size of a model that a reward loads, for the planner.

    parameters   number of weights, which rewards keep in fp32
    flops        FLOPs of one image; None where nobody counted them
    activations  bytes that a gradient to one image's pixels keeps; None where nobody counted them
    """

    parameters: float
    flops: float | None = None
    activations: float | None = None


class Reward(ABC):
    """Scores images with one reward model. The constructor is cheap; `load` runs on the worker that scores.

    The same (image, prompt) always gets the same value, whatever else is in the batch. A reward raises if scoring fails
    (a RewardError if it knows the kind), and the worker tries again, looks for the images that are to blame, and masks
    them. A reward that knows these images names them in its result's failure. It never returns a stand-in value.

    `needs` says what a prompt must have to be judged ("": its text will do), as the end of a sentence; `judges` tests
    it. `metadata` says what each of a prompt's fields means that the reward reads beside the text. `headline` names the
    detail that a run shows first in place of the score. `remote` says that a service computes the score. `imports`
    names what `load` imports, in the form of `pkgutil.resolve_name`: a worker may start with it. `job` is the name of
    the run that is scored for, "" outside of one.
    """

    Config: type[RewardSection]
    needs: ClassVar[str] = ""
    metadata: ClassVar[Mapping[str, str]] = {}
    headline: ClassVar[str] = ""
    remote: ClassVar[bool] = False
    imports: ClassVar[tuple[str, ...]] = ()
    job: str = ""

    def __init__(self, config: RewardSection) -> None:
        self.config = config

    @classmethod
    def judges(cls, prompt: Prompt) -> bool:
        """Return whether the reward has a value for images of the prompt."""
        return True

    @property
    def usual(self) -> float:
        """The score that ordinary images have, where it is far from 0."""
        return 0.0

    @property
    def bounds(self) -> Bounds:
        """The least and the largest score that there can be, each None where nothing bounds it."""
        return None, None

    def vocabulary(self) -> Vocabulary | None:
        """Return what the reward's tokenizer knows; None where it is not on this machine, or no text is read."""
        return None

    def prompt_problems(self, where: str, prompts: Iterable[Prompt]) -> Iterator[str]:
        """Yield a sentence for each thing in a run's prompts that the reward at path `where` cannot work with."""
        yield from ()

    @abstractmethod
    def load(self, device: str, threads: int) -> None:
        """Load models to `device`, to run on `threads` CPU threads. Raises UserError that says what is missing."""

    @abstractmethod
    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Result:
        """Score images uint8 [B, H, W, 3], one prompt an image."""

    def model_sizes(self) -> list[ModelSize | None]:
        """Return the sizes of the models that `load` loads with these settings.

        None stands for a model of unknown size; the planner then says that it counts nothing.
        """
        return [None]


class DifferentiableReward(Reward):
    """Scores with a gradient to the pixels. It judges every prompt, and its score is the same computation.

    `reads_text` says whether the prompt plays a part.
    """

    reads_text: ClassVar[bool] = True

    @torch.no_grad()
    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Result:
        """Score the images as floats in [0, 1]."""
        pixels = torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2)
        values = self.differentiable(pixels, prompts).cpu().double().numpy()
        return Result(values, np.ones(len(prompts), dtype=bool))

    @abstractmethod
    def differentiable(self, images: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        """Return scores fp32 [B] of images float [B, 3, H, W] in [0, 1], with a gradient to the pixels only."""

    def against(self, images: torch.Tensor, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return scores fp32 [B, J] of every image under each of its own J texts, with a gradient to the pixels."""
        columns = zip(*texts, strict=True)
        return torch.stack([self.differentiable(images, [Prompt(0, text) for text in own]) for own in columns], 1)


class EmbeddingReward(DifferentiableReward):
    """Scores `factor` times the cosine of an image's and a text's embedding, in fp32 under any autocast.

    One embedding of an image is judged under any number of texts. The embeddings of the last `kept` texts are kept.
    Each text is read alone, so its embedding does not depend on other texts.
    """

    factor: float = 1.0
    kept: ClassVar[int] = 4096

    @property
    def bounds(self) -> Bounds:
        """Those of a cosine. A model's own factor, which another `scale` brings in, is known once it is loaded."""
        return (-1.0, 1.0) if getattr(self.config, "scale", "cosine") == "cosine" else (None, None)

    @abstractmethod
    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings [B, D] of images float [B, 3, H, W] in [0, 1], on the reward's device, with a gradient."""

    @abstractmethod
    def read(self, text: str) -> torch.Tensor:
        """Return the embedding [D] of a text."""

    def differentiable(self, images: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        """Judge each image under its own prompt."""
        return self.against(images, [[prompt.text] for prompt in prompts])[:, 0]

    def against(self, images: torch.Tensor, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Embed each image once and compare it with each of its texts; each distinct text is read once."""
        with torch.autocast(images.device.type, enabled=False):  # bf16 would change the third digit of a cosine
            seen = F.normalize(self.see(images), dim=-1)
            read = torch.stack([torch.stack([self._read(text) for text in own]) for own in texts])
            # The bits of a matrix product would depend on the number of texts and images; those of a sum do not.
            return self.factor * (seen[:, None] * read).sum(-1)

    @torch.no_grad()
    def _read(self, text: str) -> torch.Tensor:
        known = self.__dict__.setdefault("_known", {})
        if text not in known:
            if len(known) >= self.kept:
                del known[next(iter(known))]
            known[text] = F.normalize(self.read(text), dim=-1)
        return known[text]
