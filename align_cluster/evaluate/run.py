"""Held-out evaluation on this machine, without Ray: the same prompts, seeds and batches as a run's own evaluations."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.evaluate.lora import sampler_with
from align_cluster.observe.table import rows, summarise
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.groups import plan_evaluation
from align_cluster.rewards.worker import RewardWorker
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.rollouts.steps import Euler
from align_cluster.types import Condition

T = TypeVar("T")


def evaluate(config: RunConfig, lora: Path | None = None) -> dict[str, Any]:
    """Score the held-out prompts under every reward of the run; returns what `table.summarise` does.

    `lora` is a safetensors file, None the base model. A run and this function give the same scores for the same LoRA on
    the same kind of device.
    """
    settings = config.evaluate
    prompts = PROMPTS[settings.prompts.kind](settings.prompts).load()
    chunks = plan_evaluation(
        prompts, settings.count, settings.images_per_prompt, settings.images_per_prompt, config.seed
    )
    sampler = sampler_with(config.backbone, lora, config.cluster.threads)
    conditions = encode(sampler, [chunk.prompt.text for chunk in chunks], settings.guidance)
    rewards = RewardWorker(dict(config.rewards), config.cluster.threads)
    request = DrawRequest(
        sampler.version, settings.steps or config.rollout.steps, Euler.Config(), guidance=settings.guidance
    )
    table: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for chunk in progress(chunks, "evaluating"):
        _, images, _ = sampler.draw(chunk, conditions[chunk.prompt.text], conditions.get(""), request)
        scores = rewards.score(images, [chunk.prompt] * len(images))
        failures |= {name: f"{failure.kind}: {failure.message}" for name, failure in scores.failures.items()}
        table += rows(chunk.prompt, scores)
    if failures and not any(value is not None for row in table for key, value in row.items() if "/" in key):
        raise UserError(f"every score failed: {'; '.join(f'{name}: {text}' for name, text in failures.items())}")
    return {**summarise(table), "failures": failures}


def encode(sampler: Sampler, texts: list[str], guidance: float) -> dict[str, Condition]:
    """Conditions by text; with guidance the empty prompt's too."""
    distinct = list(dict.fromkeys(texts + ([""] if guidance > 1 else [])))
    return dict(zip(distinct, sampler.encode(distinct), strict=True))


def progress(items: list[T], what: str) -> Iterable[T]:
    """The items behind a progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)
