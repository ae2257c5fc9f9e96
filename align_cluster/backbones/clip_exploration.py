"""E2PO's exploration for pipelines whose first text encoder is a CLIP."""

from abc import abstractmethod
from functools import cached_property
from typing import ClassVar

import numpy as np

from align_cluster.conditions.address import address
from align_cluster.conditions.exploration import E2po
from align_cluster.conditions.perturb import beside, learn
from align_cluster.streams import hashed
from align_cluster.types import Condition, Perturbation


class ClipExploration:
    """Adds E2PO's exploration to pipelines with a CLIP as first text encoder: a mixin before PipelineBackbone.

    `layer` is the hidden state that enters a condition's sequence; None is the encoder's normalised output.
    """

    explorable: ClassVar[bool] = True
    clips: ClassVar[tuple[tuple[str, str], ...]] = (("text_encoder", "tokenizer"),)
    layer: ClassVar[int | None] = -2

    def perturb(self, texts: list[str], config: E2po, seed: int) -> list[Perturbation]:
        """Learn perturbed encodings of prompts, each independent of the others."""
        keys = [self.perturbation_key(text, config, seed) for text in texts]
        found = []
        for number, names in enumerate(self._perturbed(config)):
            encoder, tokenizer = (getattr(self._text, name) for name in names)
            own = hashed(f"{seed}/{number}") if number else seed
            found.append(learn(encoder, tokenizer, texts, keys, config, own, self.layer))
        self._release()
        return found[0] if len(found) == 1 else [beside(parts) for parts in zip(*found, strict=True)]

    def _perturbed(self, config: E2po) -> tuple[tuple[str, str], ...]:
        return self.clips if config.encoders == "both" else self.clips[:1]

    def perturbation_key(self, text: str, config: E2po, seed: int) -> str:
        """Return the content address of a prompt's perturbations: a hash of everything that they depend on."""
        identity = self._clip_identity[: 1 + (config.encoders == "both")]
        return address(learn, identity, str(self.dtype), config.model_dump(exclude=config.drawing), seed, text)

    @cached_property
    def _clip_identity(self) -> list:
        return [self._identity(*names) for names in self.clips]

    def insert(self, condition: Condition, perturbation: Perturbation, variant: int) -> Condition:
        """Return the condition with its CLIP part replaced by a variant, 1 ... K - 1; variant 0 changes nothing."""
        if variant == 0:
            return condition
        if perturbation.hidden.dtype != condition.sequence.dtype:
            raise ValueError("a condition and its perturbation come from encoders of different precision")
        encoding = self.replaced(condition, perturbation.hidden[variant - 1], perturbation.pooled[variant - 1])
        return Condition(f"{condition.key}/{perturbation.key}/{variant}", *encoding)

    @abstractmethod
    def replaced(self, condition: Condition, hidden: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (sequence, pooled) of the condition with CLIP's hidden states [S, d] and pooled vector in place."""
