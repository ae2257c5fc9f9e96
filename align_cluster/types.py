"""The records that travel between stages. Each record names its prompt, group, members, seeds and policy version.

Arrays inside records are NumPy arrays, because Ray's object store passes those without a copy.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """Holds one prompt. `metadata` is what rewards read: GenEval's tag, include and exclude, or `text` for OCR."""

    id: int
    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def task(self) -> str:
        """Return the name under which scores are reported: the GenEval tag, or "all"."""
        return self.metadata.get("tag", "all")


@dataclass(frozen=True)
class Condition:
    """Holds one prompt's encoding: `sequence` [T, D] and `pooled` [P]. `key` is its content address.

    Both have the text encoders' type, fp32 or bf16, in the form that conditions/precision.py gives it.
    """

    key: str
    sequence: np.ndarray
    pooled: np.ndarray

    @property
    def nbytes(self) -> int:
        """Return the size of the encoding in bytes."""
        return self.sequence.nbytes + self.pooled.nbytes


@dataclass(frozen=True)
class Perturbation:
    """Holds V variants of a prompt's CLIP encoding, which E2PO uses in place of the original encoding.

    key        content address of the perturbation
    hidden     [V, T, D]    hidden states, in the type and form of the Condition's arrays
    pooled     [V, P]       pooled embeddings, likewise
    cosines    [V]          cosine of each variant's global embedding to the original's, fp64
    pairwise   mean cosine between variants, NaN for fewer than two
    """

    key: str
    hidden: np.ndarray
    pooled: np.ndarray
    cosines: np.ndarray
    pairwise: float

    @property
    def nbytes(self) -> int:
        """Return the size of all variants in bytes."""
        return self.hidden.nbytes + self.pooled.nbytes + self.cosines.nbytes


ChunkId = tuple[int, int]  # step, number within the step


@dataclass(frozen=True)
class Row:
    """Describes one image to draw: member number `member` of prompt group number `group` of a step.

    seed      63 bits that depend on (run seed, step, group, member) only; all of them decide the stream of the row's
              noise (`streams.py`), so all workers draw the same image
    noise     seed of the initial noise; rows that share it start from the same noise
    variant   the condition: 0 is the prompt's own, k its k-th perturbation
    """

    prompt: Prompt
    group: int
    member: int
    seed: int
    noise: int
    variant: int = 0


@dataclass(frozen=True)
class Chunk:
    """Describes the unit of work: a fixed list of rows, of one prompt or of several, that are always batched together.

    `number` counts the chunks of a step; rows follow one another through the step, group by group.
    """

    step: int
    number: int
    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def id(self) -> ChunkId:
        """Return (step, number), which is unique within a run."""
        return self.step, self.number

    @property
    def prompts(self) -> list[Prompt]:
        """Return the prompt of each row."""
        return [row.prompt for row in self.rows]

    @property
    def seeds(self) -> list[int]:
        """Return the seed of each row."""
        return [row.seed for row in self.rows]

    @property
    def noises(self) -> list[int]:
        """Return the seed of each row's initial noise."""
        return [row.noise for row in self.rows]

    @property
    def variants(self) -> list[int]:
        """Return the variant of the condition of each row."""
        return [row.variant for row in self.rows]

    @property
    def texts(self) -> list[str]:
        """Return the different texts of the rows, in their order."""
        return list(dict.fromkeys(row.prompt.text for row in self.rows))

    @property
    def perturbed_texts(self) -> list[str]:
        """Return the different texts of the rows that are drawn under a perturbed condition, in their order."""
        return list(dict.fromkeys(row.prompt.text for row in self.rows if row.variant))


@dataclass(frozen=True)
class DrawInfo:
    """Holds what the driver keeps of a drawn chunk. Images and the record stay in the object store.

    version       policy version that drew the chunk
    fingerprint   hash of everything that decided the draw
    seconds       time of the draw
    contrast      standard deviation of an image's pixels in [0, 1], averaged over images
    diversity     standard deviation of a pixel between images of one group, averaged over pixels and groups; 0 where no
                  group has two images in the chunk
    non_finite    rows whose latents or pixels became NaN or infinite: their images are black, their records 0, and they
                  count neither in these numbers nor anywhere else
    """

    chunk: Chunk
    version: int
    fingerprint: str
    seconds: float
    contrast: float = 0.0
    diversity: float = 0.0
    non_finite: tuple[int, ...] = ()


@dataclass(frozen=True)
class Record:
    """Holds what the learner needs of a drawn chunk with B rows; latents are C x H x W, fp32.

    x0           [B, C, H, W]    final latents
    sigmas       [N + 1]         exact noise levels of the rollout, from 1 to 0
    indices      [B, K]          recorded denoising steps, which differ between samples (K = 0 for an ODE rollout)
    before       [B, K, C, H, W] latents before those steps
    after        [B, K, C, H, W] latents after those steps
    log_probs    [B, K]          log-density of `after` under the policy and the original condition
    means        [B, K, C, H, W] mean of that density, if the algorithm asks for it
    slots        which of the K steps are trained (default: all); a whole path also holds steps that are not
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
    """Says why a reward has no score for the images at places `rows` of a batch, which are in order."""

    kind: FailureKind
    message: str
    rows: tuple[int, ...]

    @property
    def images(self) -> int:
        """Return the number of images without a score."""
        return len(self.rows)


@dataclass(frozen=True)
class Scores:
    """Holds the scores of B images from all rewards.

    values     fp64 [B] by reward name, without NaN where `valid` holds
    valid      bool [B] by reward name
    failures   the failure by reward name, with the rows that the reward applies to but could not score; where several
               things went wrong, it tells the first
    details    more columns for reports, [B] by name, such as the accuracy or the text that was read
    seconds    computing time by reward name
    """

    values: dict[str, np.ndarray]
    valid: dict[str, np.ndarray]
    failures: dict[str, Failure] = field(default_factory=dict)
    details: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ReplayBatch:
    """Holds the states of images of earlier steps and of this one that a critic makes one update from.

    states    fp16 [n, C, H, W]
    levels    fp32 [n], their noise levels
    targets   fp32 [n, R], what their values regress on; NaN where a reward does not judge the image
    texts     the prompts [n]
    total     number of states of the whole update, of which a rank has a share
    """

    states: np.ndarray
    levels: np.ndarray
    targets: np.ndarray
    texts: tuple[str, ...]
    total: int

    def share(self, rank: int, world: int) -> "ReplayBatch":
        """Return every world-th state, from number `rank` on."""
        mine = slice(rank, None, world)
        return ReplayBatch(self.states[mine], self.levels[mine], self.targets[mine], self.texts[mine], self.total)


@dataclass(frozen=True)
class Credit:
    """Holds the advantages of one step for P groups of G members, and metrics to log about them.

    advantages   fp32 [P, G], or [P, G, N] with a critic: one number a denoising step
    valid        bool [P, G]; a masked sample has False, and its advantage is 0
    returns      [P, G, N, R]: the critic's regression targets, if it learns from this step's images alone
    values       [P, G, N, R]: the critic's values before the update, likewise
    replay       the critic's updates, if it learns from replayed states
    actor        False if only the critic learns in this step
    """

    advantages: np.ndarray
    valid: np.ndarray
    metrics: dict[str, float]
    returns: np.ndarray | None = None
    values: np.ndarray | None = None
    replay: tuple[ReplayBatch, ...] | None = None
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
    """Locates one tensor in a flat weight buffer; `offset` is in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True)
class Manifest:
    """Lists the contents of one published weight buffer. A receiver must bind exactly these tensors."""

    version: int
    tensors: tuple[Tensor, ...]
    nbytes: int
    checksum: str


@dataclass(frozen=True)
class Receipt:
    """Proves a worker's weight sync. Its checksum is taken from the adopted parameters, not from the buffer.

    `bound` counts the tensors that were bound to a parameter, and `seconds` is the time of the sync.
    """

    worker: str
    version: int
    bound: int
    checksum: str
    seconds: float
