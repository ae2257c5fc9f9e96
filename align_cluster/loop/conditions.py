"""Conditions and perturbed conditions of a run's prompts. Samplers compute them; the object store keeps them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from align_cluster.cluster.pool import Pool, stream
from align_cluster.config.run import RunConfig
from align_cluster.types import Prompt

MOST_TEXTS = 32  # texts in one call of a sampler: enough to fill a text encoder's batch


@dataclass(frozen=True)
class Perturbed:
    """Refers to one prompt's perturbed conditions; says how far they are from the original and from each other."""

    key: str
    reference: Any
    cosine: float
    pairwise: float


class ConditionStore:
    """Has each text encoded once, by whichever sampler is free, and keeps references to the results."""

    def __init__(self, config: RunConfig, samplers: Pool) -> None:
        self.config, self.samplers = config, samplers
        self.references: dict[str, Any] = {}
        self.keys: dict[str, str] = {}
        self.perturbed: dict[str, Perturbed] = {}

    def encode(self, prompts: Sequence[Prompt]) -> None:
        """Have every new text encoded, and the empty prompt where guidance needs it."""
        guided = max(self.config.rollout.guidance, self.config.evaluate.guidance) > 1
        texts = dict.fromkeys([prompt.text for prompt in prompts] + ([""] if guided else []))
        new = [text for text in texts if text not in self.references]
        for start in range(0, len(new), MOST_TEXTS):
            self.samplers.submit(start, "encode", new[start : start + MOST_TEXTS])
        for done in stream(self.samplers):
            for text, condition in zip(new[done.key : done.key + MOST_TEXTS], done.value, strict=True):
                self.references[text], self.keys[text] = ray.put(condition), condition.key

    def explore(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Learn the perturbed conditions of every new text (phase 1 of E2PO); return the metrics of all `prompts`."""
        settings = self.config.exploration
        if settings is None or settings.conditions == 1:
            return {}
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        new = [text for text in texts if text not in self.perturbed]
        size = min(MOST_TEXTS, -(-len(new) // self.samplers.size)) or 1
        for start in range(0, len(new), size):
            self.samplers.submit(start, "perturb", new[start : start + size], settings, self.config.seed)
        for done in stream(self.samplers):
            for text, found in zip(new[done.key : done.key + size], done.value, strict=True):
                facts = (float(found.cosines.mean()), float(found.pairwise))
                self.perturbed[text] = Perturbed(found.key, ray.put(found), *facts)
        known = [self.perturbed[text] for text in texts]
        metrics = {"explore/anchor_cosine": float(np.mean([item.cosine for item in known]))}
        if settings.conditions > 2:
            metrics["explore/pairwise_cosine"] = float(np.mean([item.pairwise for item in known]))
        return metrics

    def of(self, text: str) -> Any:
        """Return a reference to a text's condition."""
        return self.references[text]

    def key(self, text: str) -> str:
        """Return the content address of a text's condition."""
        return self.keys[text]

    def null(self, guidance: float) -> Any:
        """Return a reference to the empty prompt's condition, or None where this guidance needs none."""
        return self.references.get("") if guidance > 1 else None

    def perturbed_of(self, text: str) -> Perturbed | None:
        """Return a text's perturbed conditions."""
        return self.perturbed.get(text)
