"""Classifier-free guidance around a backbone's velocity. Rollout and learner call the same function."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from align_cluster.backbones.base import Backbone
from align_cluster.types import Condition


@dataclass(frozen=True)
class TextBatch:
    """Holds the conditions of a batch on the device: `sequence` [B, T, D] and `pooled` [B, P].

    Shorter sequences are padded with zeros; `mask` bool [B, T] is then True where a sequence has a token.
    `null_sequence` and `null_pooled` are the empty prompt's, and are present only with guidance.
    """

    sequence: torch.Tensor
    pooled: torch.Tensor
    mask: torch.Tensor | None = None
    null_sequence: torch.Tensor | None = None
    null_pooled: torch.Tensor | None = None

    @classmethod
    def build(cls, conditions: Sequence[Condition], null: Condition | None, device: torch.device) -> "TextBatch":
        """Stack conditions, and repeat the null condition for each of them if there is one."""
        # Conditions may lie in read-only shared memory, which torch warns about, so they are copied.
        sequences = [torch.tensor(item.sequence) for item in conditions]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        sequence = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)
        pooled = torch.stack([torch.tensor(item.pooled) for item in conditions]).to(device)
        padded = bool((lengths != lengths[0]).any())
        mask = (torch.arange(sequence.shape[1]) < lengths[:, None]).to(device) if padded else None
        if null is None:
            return cls(sequence, pooled, mask)
        nothing = (torch.tensor(array).to(device) for array in (null.sequence, null.pooled))
        return cls(sequence, pooled, mask, *(array.expand(len(conditions), *array.shape) for array in nothing))

    def __getitem__(self, rows: torch.Tensor) -> "TextBatch":
        """Return the conditions of these rows, each one or more times."""
        found = (None if tensor is None else tensor[rows] for tensor in self.tensors)
        return TextBatch(*found)

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Return all parts, in the order of the fields."""
        return self.sequence, self.pooled, self.mask, self.null_sequence, self.null_pooled

    def towards(self, other: "TextBatch", weight: float) -> "TextBatch":
        """Return this batch moved by `weight` in [0, 1] towards another; rows equal in both keep their bits."""
        return replace(
            self,
            sequence=torch.lerp(self.sequence, other.sequence, weight),
            pooled=torch.lerp(self.pooled, other.pooled, weight),
        )


def guided_velocity(
    backbone: Backbone,
    denoiser: torch.nn.Module,
    x: torch.Tensor,
    sigma: torch.Tensor,
    text: TextBatch,
    guidance: float = 1.0,
    null_gradient: bool = False,
) -> torch.Tensor:
    """Return the guided velocity, like x: the backbone combines the text branch with the null branch.

    With guidance 1 there is no null branch. The null branch carries gradient only with `null_gradient`; the official
    Flow-GRPO code detaches it.

    The two branches are separate forward passes, where Flow-GRPO stacks them. So the text branch has the same batch,
    and the same bits, in a rollout without gradient and in the learner with it.
    """
    v = backbone.velocity(denoiser, x, sigma, text.sequence, text.pooled, text.mask)
    if guidance == 1.0:
        return v
    with torch.set_grad_enabled(null_gradient and torch.is_grad_enabled()):
        v_null = backbone.velocity(denoiser, x, sigma, text.null_sequence, text.null_pooled)
    return backbone.guide(v, v_null, guidance)
