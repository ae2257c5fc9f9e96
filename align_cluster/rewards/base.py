"""The contract of a reward: a pure function of (image, prompt), with a validity mask."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
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

MOST = 1e30  # largest magnitude of a score, weighted or not: squares stay far inside fp64, and advantages inside fp32


def sound(values: np.ndarray) -> np.ndarray:
    """Return which numbers can be computed with: they are finite and at most MOST."""
    return np.abs(values) <= MOST  # False for NaN


class FailurePolicy(Section):
    """Configures what happens if scoring fails: `retries` more tries, then `then`. The first waits `backoff_s`.

    Each later retry waits twice as long as the one before. After the retries, mask leaves the images out of the
    statistics, drop_group leaves out all images of their prompt, and fail ends the run. A monitor's failures are only
    counted. A worker that is busy with one batch for more than `timeout_s` is replaced, and up to `retries` other
    workers try the batch, which is then halved. Rewards that share workers add up their times.

    A run ends where the first evaluation has no score of a trained reward because all failed, or after `stop_after`
    such training steps in a row; null goes on without it.
    """

    retries: Annotated[int, Field(ge=0, le=20)] = 2
    backoff_s: Annotated[float, Field(ge=0)] = 0.5
    timeout_s: PositiveFloat = 300.0
    then: Literal["mask", "drop_group", "fail"] = "mask"
    stop_after: PositiveInt | None = 3


class PoolSection(Section):
    """Configures workers that score only this reward.

    workers       number of workers
    max_workers   number of workers while a backlog grows, if the cluster has room
    cpus, gpus    what each worker takes (cpus null: a share of the remaining cores); workers with less than 0.5 of a
                  GPU share GPUs with samplers if there is room, the others have GPUs of their own
    batch         number of images that are scored together
    batching      `ordered` batches consecutive chunks of the step; `dynamic` batches whatever waits and never waits
                  for a late chunk, but the last bits of a score then depend on timing
    pip           requirements that Ray installs for these workers alone
    """

    workers: PositiveInt = 1
    max_workers: PositiveInt | None = Field(None, description="null: as workers")
    cpus: PositiveFloat | None = None
    gpus: Annotated[float, Field(ge=0)] = 0.0
    batch: PositiveInt | None = Field(None, description="null: one chunk")
    batching: Literal["ordered", "dynamic"] = "ordered"
    pip: tuple[str, ...] = ()

    @field_validator("max_workers")
    @classmethod
    def not_below_the_minimum(cls, count: int | None, info: ValidationInfo) -> int | None:
        """Refuse `max_workers` below `workers`."""
        if count is not None and count < info.data.get("workers", 1):
            raise ValueError(f"at least workers, {info.data['workers']}")
        return count


class RewardSection(Section):
    """Holds the settings that every reward shares.

    A `monitor` is scored and reported but never trained on, and its weight has no effect. Rewards without a `pool`
    share `cluster.reward_workers`, one after the other; a reward with a pool is scored in parallel.
    """

    weight: float = 1.0
    role: Literal["train", "monitor"] = "train"
    on_failure: FailurePolicy = FailurePolicy()
    pool: PoolSection | None = None


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
    it. `headline` names the detail that a run shows first in place of the score. `remote` says that a service computes
    the score. `imports` names what `load` imports, in the form of `pkgutil.resolve_name`: a worker may start with it.
    """

    Config: type[RewardSection]
    needs: ClassVar[str] = ""
    headline: ClassVar[str] = ""
    remote: ClassVar[bool] = False
    imports: ClassVar[tuple[str, ...]] = ()

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
