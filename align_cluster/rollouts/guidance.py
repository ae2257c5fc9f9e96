"""Classifier-free guidance around a backbone's velocity. Rollout and learner call the same function."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from align_cluster.backbones.base import Backbone
from align_cluster.conditions.precision import to_tensor
from align_cluster.types import Condition, Perturbation, Row


@dataclass(frozen=True)
class TextBatch:
    """Holds the conditions of a batch on the device, in fp32: `sequence` [B, T, D] and `pooled` [B, P].

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
        # Each condition goes to the device once and in its own precision, however many rows share it.
        own = {
            id(item): [to_tensor(array).to(device).float() for array in (item.sequence, item.pooled)]
            for item in (*conditions, *([] if null is None else [null]))
        }
        sequences, pooled = zip(*(own[id(item)] for item in conditions), strict=True)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        sequence = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        padded = len({len(one) for one in sequences}) > 1
        mask = torch.arange(sequence.shape[1], device=device) < lengths[:, None] if padded else None
        nothing = () if null is None else (part.expand(len(conditions), *part.shape) for part in own[id(null)])
        return cls(sequence, torch.stack(pooled), mask, *nothing)

    @classmethod
    def perturbed(
        cls,
        rows: Sequence[Row],
        conditions: Mapping[str, Condition],
        perturbations: Mapping[str, Perturbation],
        insert: Callable[[Condition, Perturbation | None, int], Condition],
        null: Condition | None,
        device: torch.device,
    ) -> "TextBatch":
        """Return the conditions that rows are drawn under at full strength; `insert` is the backbone's."""
        texts = [row.prompt.text for row in rows]
        variants = zip(texts, rows, strict=True)
        own = [insert(conditions[text], perturbations.get(text), row.variant) for text, row in variants]
        return cls.build(own, null, device)

    def __getitem__(self, rows: torch.Tensor) -> "TextBatch":
        """Return the conditions of these rows, each one or more times."""
        return TextBatch(**{name: None if part is None else part[rows] for name, part in vars(self).items()})

    def towards(self, other: "TextBatch", weight: float | torch.Tensor) -> "TextBatch":
        """Return this batch moved by `weight` in [0, 1], one number or one a row [B], towards another; rows equal in
        both keep their bits."""
        each = isinstance(weight, torch.Tensor)
        return replace(
            self,
            sequence=torch.lerp(self.sequence, other.sequence, weight.view(-1, 1, 1) if each else weight),
            pooled=torch.lerp(self.pooled, other.pooled, weight.view(-1, 1) if each else weight),
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
