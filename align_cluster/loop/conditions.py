"""Conditions and perturbed conditions of a run's prompts. Samplers compute them; the object store keeps recent ones."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from align_cluster.cluster.pool import Done, Pool, stream
from align_cluster.config.run import ClusterConfig, RunConfig
from align_cluster.settings import GIB
from align_cluster.types import Chunk, Condition, Perturbation, Prompt

log = logging.getLogger(__name__)
SHARE = 0.1  # of the object store's free memory: images and records of a step need the rest
MOST_TEXTS = 32  # texts in one call of a sampler: enough to fill a text encoder's batch


@dataclass(frozen=True)
class Stored:
    """Refers to a record in the object store, by its content address; `nbytes` is its size."""

    key: str
    nbytes: int
    reference: Any


@dataclass(frozen=True)
class Perturbed(Stored):
    """Refers to one prompt's perturbed conditions; says how far they are from the original and from each other."""

    cosine: float
    pairwise: float


@dataclass(frozen=True)
class Texts:
    """Holds what a chunk's texts are drawn and trained with, by text, and a reference to the empty prompt's condition
    where guidance needs it. It stays good, whatever the store lets go of meanwhile."""

    conditions: dict[str, Stored]
    perturbed: dict[str, Perturbed]
    null: Any


class Recent:
    """Keeps what was stored for texts, each kind apart, up to `limit` bytes together. What was needed longest ago goes.

    What is needed now stays, even where that alone exceeds the limit. A call takes longer for more texts, not for more
    that is kept.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.nbytes = limit, 0
        self.needed: dict[str, dict[str, Stored]] = {}
        self.spare: OrderedDict[tuple[str, str], Stored] = OrderedDict()  # needed longest ago first

    def need(self, kind: str, texts: Sequence[str]) -> list[str]:
        """Keep what is stored for `texts` until the next call for this kind; return the texts that have nothing yet."""
        before, now, missing = self.needed.get(kind, {}), {}, []
        for text in dict.fromkeys(texts):
            found = before.pop(text, None) or self.spare.pop((kind, text), None)
            if found:
                now[text] = found
            else:
                missing.append(text)
        self.needed[kind] = now
        self.spare.update({(kind, text): stored for text, stored in before.items()})
        self._shrink()
        return missing

    def add(self, kind: str, text: str, stored: Stored) -> None:
        """Keep what was missing, as long as the other texts of the last `need`."""
        self.needed[kind][text] = stored
        self.nbytes += stored.nbytes
        self._shrink()

    def forget(self, kind: str) -> None:
        """Let go of all that is stored of a kind."""
        for text, stored in self.needed.pop(kind, {}).items():
            self.spare[kind, text] = stored
        for name in [name for name in self.spare if name[0] == kind]:
            self.nbytes -= self.spare.pop(name).nbytes

    def find(self, kind: str, text: str) -> Any | None:
        """Return what is stored for a text, or None."""
        return self.needed.get(kind, {}).get(text) or self.spare.get((kind, text))

    def _shrink(self) -> None:
        while self.nbytes > self.limit and self.spare:
            _, stored = self.spare.popitem(last=False)
            self.nbytes -= stored.nbytes


class ConditionStore:
    """Has texts encoded by whichever sampler is free, and keeps references to the results, up to a bound.

    A text that went out comes back from the samplers' disk cache, or is encoded again.
    """

    def __init__(self, config: RunConfig, samplers: Pool) -> None:
        self.config, self.samplers = config, samplers
        self.others: Callable[[Done], None] = _unexpected  # takes what others have asked the samplers for
        self.recent = Recent(bound(config.cluster))
        self.warned = False

    def encode(self, prompts: Sequence[Prompt]) -> None:
        """Have every text that is not in the store encoded, and the empty prompt where guidance needs it.

        All of them stay there until the next call.
        """
        guided = max(self.config.rollout.guidance, self.config.evaluate.guidance) > 1
        new = self.recent.need("condition", [prompt.text for prompt in prompts] + ([""] if guided else []))
        for text, found in self._ask("encode", new):
            self.recent.add("condition", text, Stored(found.key, found.nbytes, ray.put(found)))
        self._warn()

    def explore(self, prompts: Sequence[Prompt], step: int) -> dict[str, float]:
        """Learn the perturbed conditions of texts that have none in the store for training step `step` (phase 1 of
        E2PO).

        All of them stay there until the next call. Returns the metrics of all `prompts`.
        """
        settings = self.config.exploration
        if settings is None or settings.conditions == 1:
            return {}
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        if settings.learned == "each_time":
            self.recent.forget("perturbation")
        new = self.recent.need("perturbation", texts)
        for text, found in self._ask("perturb", new, settings, settings.seed_in(self.config.seed, step)):
            facts = (float(found.cosines.mean()), float(found.pairwise))
            self.recent.add("perturbation", text, Perturbed(found.key, found.nbytes, ray.put(found), *facts))
        self._warn()
        known = [self.perturbed_of(text) for text in texts]
        metrics = {"explore/anchor_cosine": float(np.mean([item.cosine for item in known]))}
        if settings.variants > 1:
            metrics["explore/pairwise_cosine"] = float(np.mean([item.pairwise for item in known]))
        return metrics

    def _ask(self, method: str, texts: list[str], *args: Any) -> Iterator[tuple[str, Condition | Perturbation]]:
        """Yield each text with what a sampler's method returns for it, as the results come.

        What samplers draw meanwhile goes to `others`.
        """
        size = min(MOST_TEXTS, -(-len(texts) // self.samplers.size)) or 1
        asked = {("texts", start): texts[start : start + size] for start in range(0, len(texts), size)}
        for key, some in asked.items():
            self.samplers.submit(key, method, some, *args)
        for done in stream(self.samplers, until=lambda: not asked):
            if done.key in asked:
                yield from zip(asked.pop(done.key), done.value, strict=True)
            else:
                self.others(done)

    def _warn(self) -> None:
        """Say once that what is needed at one time is larger than the bound."""
        if self.recent.nbytes > self.recent.limit and not self.warned:
            self.warned = True
            log.warning(
                "the conditions of one step or evaluation take %.2g GiB of the object store, more than "
                "cluster.condition_cache_gib, %.2g GiB: raise it, or take fewer prompts at a time",
                self.recent.nbytes / GIB,
                self.recent.limit / GIB,
            )

    def texts(self, chunk: Chunk, guidance: float) -> Texts:
        """Return what the last `encode` and `explore` have found for a chunk of their prompts."""
        conditions = {text: self._condition(text) for text in chunk.texts}
        perturbed = {text: self.perturbed_of(text) for text in chunk.perturbed_texts}
        return Texts(conditions, perturbed, self.null(guidance))

    def of(self, text: str) -> Any:
        """Return a reference to a text's condition. Raises KeyError for a text that the last `encode` did not name and
        that has gone out since."""
        return self._condition(text).reference

    def key(self, text: str) -> str:
        """Return the content address of a text's condition; raises KeyError as `of` does."""
        return self._condition(text).key

    def _condition(self, text: str) -> Stored:
        found = self.recent.find("condition", text)
        if found is None:
            raise KeyError(f"the condition of {text!r} is not in the store; call `encode` with its prompt first")
        return found

    def null(self, guidance: float) -> Any:
        """Return a reference to the empty prompt's condition, or None where this guidance needs none."""
        return self.of("") if guidance > 1 else None

    def perturbed_of(self, text: str) -> Perturbed | None:
        """Return a text's perturbed conditions, if the store has them."""
        return self.recent.find("perturbation", text)


def bound(config: ClusterConfig) -> float:
    """Return the bytes of the object store that conditions may take.

    By default they are SHARE of what is free where the driver runs, because the driver's node holds them.
    """
    if config.condition_cache_gib is not None:
        return config.condition_cache_gib * GIB
    here = ray.get_runtime_context().get_node_id()
    own = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return SHARE * min(resources.get("object_store_memory", 0.0) for resources in (own, ray.available_resources()))


def _unexpected(done: Done) -> None:
    raise RuntimeError(f"a sampler's answer to {done.key}, which nobody waits for")
