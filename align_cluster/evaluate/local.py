"""Drawing and scoring on this machine, without Ray: the one path of `evaluate`, `sample` and steering."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from align_cluster.backbones import BACKBONES
from align_cluster.backbones.lora_file import Lora
from align_cluster.config.plan import evaluation_pieces, local_resources, settle
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.evaluate.lora import bind, check_fits
from align_cluster.observe.table import rows, summarise
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.groups import plan_evaluation
from align_cluster.rewards.mix import without
from align_cluster.rewards.worker import RewardWorker
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.rollouts.steps import Euler
from align_cluster.types import Chunk, Condition, Prompt, Scores

T = TypeVar("T")
ImagesAndFacts = tuple[np.ndarray, list[dict[str, Any]]]  # images uint8 [B, H, W, 3], and facts about each of them


@dataclass(frozen=True)
class DrawnChunk:
    """Holds the images uint8 [B, H, W, 3] of one chunk and what is known of each.

    `facts` say how each image was made, such as its seed. `rows` hold its scores as `table.rows` returns them; the list
    is empty where nothing is scored.
    """

    chunk: Chunk
    images: np.ndarray
    facts: list[dict[str, Any]]
    rows: list[dict[str, Any]]


class LocalModel:
    """Draws and scores with the model of a run file in this process, on a GPU if there is one.

    The model starts as the base model, and `bind` adds the LoRA. `failures` maps the name of each reward that failed to
    the reason.
    """

    def __init__(
        self,
        config: RunConfig,
        lora: Lora | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        score: bool = True,
    ) -> None:
        """Read the settings of the model, and no weights of the base model. `lora` is what `bind` adds.

        `steps` and `guidance` are by default those of the run's evaluation. With `score` the run's rewards score every
        image. Raises UserError for numbers below 1, for a LoRA that does not fit the base model, and for an image size
        that the model does not have.
        """
        self.config, self.scored = settle(config, *local_resources()), score
        self.steps = (config.evaluate.steps or config.rollout.steps) if steps is None else steps
        self.guidance = config.evaluate.guidance if guidance is None else guidance
        if self.steps < 1 or self.guidance < 1:
            raise UserError(f"--steps {self.steps} and --guidance {self.guidance} must be at least 1")
        self.lora, backbone = lora, config.backbone
        if self.lora:
            sizes = {"rank": self.lora.rank, "alpha": self.lora.alpha}
            backbone = backbone.model_copy(update={"lora": backbone.lora.without_start().model_copy(update=sizes)})
            self.lora = check_fits(BACKBONES[backbone.kind](backbone), self.lora)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        merge = self.config.rollout.merge_lora
        self.sampler = Sampler(backbone, config.cluster.threads, "local", device, merge)
        _ = self.sampler.backbone.latent_shape  # refuses a size that cannot be divided, before any weights are read
        self.failures: dict[str, str] = {}
        self.conditions: dict[str, Condition] = {}  # of all texts that `draw` has encoded

    def bind(self) -> None:
        """Add the LoRA to the base model, if there is one."""
        if self.lora:
            bind(self.sampler, self.lora)

    @cached_property
    def rewards(self) -> RewardWorker | None:
        """The run's rewards, loaded at first use; None without `score`."""
        return RewardWorker(dict(self.config.rewards), threads=self.config.cluster.threads) if self.scored else None

    def draw(
        self, chunks: list[Chunk], label: str, draw_chunk: Callable[[Chunk], ImagesAndFacts] | None = None
    ) -> Iterator[DrawnChunk]:
        """Draw and score the chunks one after the other, behind a progress bar with this label.

        `draw_chunk` draws one chunk, by default as a run's evaluation does.
        """
        _ = self.rewards  # a reward that cannot be loaded ends the command before anything is drawn
        texts = [*(text for chunk in chunks for text in chunk.texts), *([""] if self.guidance > 1 else [])]
        missing = [text for text in dict.fromkeys(texts) if text not in self.conditions]
        self.conditions |= zip(missing, self.sampler.encode(missing), strict=True)
        for chunk in progress(chunks, label):
            images, facts = (draw_chunk or self.draw_unsteered)(chunk)
            prompts = chunk.prompts[: len(images)]  # a steered chunk has one prompt, and keeps some of its images
            scores = self.score(images, prompts)
            if scores:
                scores = without(scores, [row for row, fact in enumerate(facts) if fact.get("non_finite")])
            yield DrawnChunk(chunk, images, facts, rows(prompts, scores) if scores else [])

    def draw_unsteered(self, chunk: Chunk) -> ImagesAndFacts:
        """Draw one chunk with ODE steps, bit for bit as a run's evaluation does; the facts are the seeds."""
        request = DrawRequest(
            version=self.sampler.version, steps=self.steps, step=Euler.Config(), guidance=self.guidance
        )
        info, images, _ = self.sampler.draw(chunk, self.conditions, self.null, request)
        broken = {row: {"non_finite": True} for row in info.non_finite}
        return images, [{"seed": seed} | broken.get(row, {}) for row, seed in enumerate(chunk.seeds)]

    @property
    def null(self) -> Condition | None:
        """Return the empty prompt's condition where guidance needs it."""
        return self.conditions[""] if self.guidance > 1 else None

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Scores | None:
        """Score images uint8 [B, H, W, 3] with one prompt each, and note failures; None without rewards."""
        if not self.rewards:
            return None
        scores = self.rewards.score(images, prompts)
        self.failures |= {name: f"{failure.kind}: {failure.message}" for name, failure in scores.failures.items()}
        return scores


def evaluate(config: RunConfig, lora: Lora | None = None) -> dict[str, Any]:
    """Score the held-out prompts under every reward of the run; return what `table.summarise` does, and `failures`.

    Without a `lora` the base model draws. Prompts, seeds and batches are those of the run's own evaluations, so both
    give the same scores for the same LoRA on the same kind of device. Raises UserError where every score failed.
    """
    settings = config.evaluate
    prompts = PROMPTS[settings.prompts.kind](settings.prompts).load()
    model = LocalModel(config, lora)
    model.bind()
    chunk, pieces = model.config.rollout.chunk, evaluation_pieces(model.config)
    chunks = plan_evaluation(prompts, settings.count, settings.images_per_prompt, chunk, config.seed, pieces)
    table = [row for drawn in model.draw(chunks, "evaluating") for row in drawn.rows]
    if model.failures and not any(value is not None for row in table for key, value in row.items() if "/" in key):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in model.failures.items())
        raise UserError(f"every score failed: {reasons}")
    return {**summarise(table), "failures": model.failures}


def progress(items: list[T], label: str) -> Iterable[T]:
    """Return the items behind a progress bar on stderr, where that is a terminal."""
    console = Console(stderr=True)
    return track(items, label, console=console, transient=True, disable=not console.is_terminal)
