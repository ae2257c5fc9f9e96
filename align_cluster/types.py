"""The records that travel between stages. Identity is in the record: prompt, group, members, seeds, policy version.

Tensors inside records are numpy arrays: they go through Ray's object store without a copy.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One prompt. `metadata` holds what rewards read: GenEval's tag/include/exclude, or `text` for OCR."""

    id: int
    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def task(self) -> str:
        """Group under which scores are reported: the GenEval tag, or "all"."""
        return self.metadata.get("tag", "all")


@dataclass(frozen=True)
class Condition:
    """Encoded text of one prompt: `sequence` [T, D] and `pooled` [P], fp32."""

    key: str
    sequence: np.ndarray
    pooled: np.ndarray


@dataclass(frozen=True)
class Perturbation:
    """K - 1 variants of one prompt's CLIP-L encoding (E2PO), to be put in the place of the original one.

    hidden [K - 1, T, D] and pooled [K - 1, P], fp32; `cosines` [K - 1] of the variants' global embeddings to the
    original's, `pairwise` their mean cosine to each other (NaN for fewer than two).
    """

    key: str
    hidden: np.ndarray
    pooled: np.ndarray
    cosines: np.ndarray
    pairwise: float


@dataclass(frozen=True)
class Chunk:
    """The unit of work: consecutive members of one prompt group, always batched together.

    `seeds` has one 63-bit integer a member. They depend on (run seed, step, group, member) only, so the same images
    come out whichever worker draws them. `noises` are the seeds of the initial noise, equal for members that share it
    (left out: each its own); `variants` say which condition a member is drawn under: 0 the prompt's own, k its k-th
    perturbation (left out: all 0).
    """

    step: int
    group: int
    first: int
    prompt: Prompt
    seeds: tuple[int, ...]
    noises: tuple[int, ...] = ()
    variants: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "noises", self.noises or self.seeds)
        object.__setattr__(self, "variants", self.variants or (0,) * len(self.seeds))

    @property
    def id(self) -> tuple[int, int, int]:
        return self.step, self.group, self.first


@dataclass(frozen=True)
class DrawInfo:
    """What the driver keeps of a drawn chunk; images and the record stay in the object store.

    `contrast` is the deviation of an image's pixels (of 0 to 1), mean over images, and `diversity` that of a pixel
    between images, mean over pixels.
    """

    chunk: Chunk
    version: int
    fingerprint: str
    seconds: float
    contrast: float = 0.0
    diversity: float = 0.0


@dataclass(frozen=True)
class Record:
    """What the learner needs of a drawn chunk; B members, C x H x W latents, fp32.

    x0           [B, C, H, W]    final latents
    sigmas       [N + 1]         the exact noise levels of the rollout, 1 ... 0
    indices      [B, K]          denoising steps that are trained, each sample's own (K = 0 for an ODE rollout)
    before       [B, K, C, H, W] latents that those steps started from
    after        [B, K, C, H, W] latents that they drew
    log_probs    [B, K]          log-density of `after` under the policy and the original condition
    means        [B, K, C, H, W] mean of that density, where the algorithm asks for it
    slots        which of the K are trained (left out: all); a whole path holds others too
    """

    chunk: Chunk
    version: int
    x0: np.ndarray
    sigmas: np.ndarray
    indices: np.ndarray
    before: np.ndarray | None = None
    after: np.ndarray | None = None
    log_probs: np.ndarray | None = None
    means: np.ndarray | None = None
    slots: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.slots is None:
            object.__setattr__(self, "slots", tuple(range(self.indices.shape[1])))


FailureKind = Literal["timeout", "oom", "bad_input", "model_error", "unavailable"]


@dataclass(frozen=True)
class Failure:
    """Why a reward has no score for `images` of a batch."""

    kind: FailureKind
    message: str
    images: int


@dataclass(frozen=True)
class Scores:
    """Scores of B images: `values` fp64 [B] by reward name, NaN-free where `valid` [B] holds.

    `failures` says, by reward name, why valid prompts have no score; `details` are extra per-image columns for reports
    (accuracy, text read). `seconds` of computing by reward.
    """

    values: dict[str, np.ndarray]
    valid: dict[str, np.ndarray]
    failures: dict[str, Failure] = field(default_factory=dict)
    details: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Credit:
    """Advantages of one step, fp32 [P, G] over groups and members, and what to log about them.

    `valid` [P, G] is False, and the advantage 0, where a sample is masked. With a critic advantages are [P, G, N], a
    number a denoising step, and `returns` and `values` [P, G, N, R] are what it regresses on and what it said.
    `actor` False: only the critic learns in this step.
    """

    advantages: np.ndarray
    valid: np.ndarray
    metrics: dict[str, float]
    returns: np.ndarray | None = None
    values: np.ndarray | None = None
    actor: bool = True


@dataclass(frozen=True)
class Metric:
    """The declaration of one number that a run writes.

    pattern   its name in metrics.jsonl, a path of segments; `<...>` stands for exactly one segment
    unit      a short label for an axis, "" where the number has none
    meaning   one line for reports
    reduce    whether the `mean` over samples, micro-batches and ranks is written, or the `largest` magnitude
    source    the learner's or the loss's own name of the number ("": the last segment of `pattern`)
    """

    pattern: str
    unit: str
    meaning: str
    reduce: Literal["mean", "largest"] = "mean"
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", self.source or self.pattern.split("/")[-1])


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in a flat weight buffer; offset in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True)
class Manifest:
    """Contents of one published weight buffer: what a receiver must find, bind and prove."""

    version: int
    tensors: tuple[Tensor, ...]
    nbytes: int
    checksum: str


@dataclass(frozen=True)
class Receipt:
    """A worker's proof of a weight sync: the checksum is taken from the adopted parameters, not from the buffer."""

    worker: str
    version: int
    bound: int
    checksum: str
    seconds: float
