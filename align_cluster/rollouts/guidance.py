"""Classifier-free guidance around a backbone's velocity. Rollout and learner call the same function."""

from dataclasses import dataclass

import torch

from align_cluster.backbones.base import Backbone
from align_cluster.conditions.precision import to_tensor
from align_cluster.types import Condition


@dataclass(frozen=True)
class TextBatch:
    """Holds the conditions of a batch on the device, in fp32: `sequence` [B, T, D] and `pooled` [B, P].

    `null_sequence` and `null_pooled` are the empty prompt's, and are present only with guidance.
    """

    sequence: torch.Tensor
    pooled: torch.Tensor
    null_sequence: torch.Tensor | None = None
    null_pooled: torch.Tensor | None = None

    @classmethod
    def build(cls, conditions: list[Condition], null: Condition | None, device: torch.device) -> "TextBatch":
        """Stack conditions, and repeat the null condition for each of them if there is one."""

        def stack(items: list[Condition]) -> tuple[torch.Tensor, torch.Tensor]:
            # Each condition goes to the device once and in its own precision, however many rows share it.
            own = {
                id(item): [to_tensor(array).to(device).float() for array in (item.sequence, item.pooled)]
                for item in items
            }
            sequences, pooled = zip(*(own[id(item)] for item in items), strict=True)
            return torch.stack(sequences), torch.stack(pooled)

        return cls(*stack(conditions), *(stack([null] * len(conditions)) if null else ()))

    def towards(self, other: "TextBatch", weight: float) -> "TextBatch":
        """Return this batch moved by `weight` in [0, 1] towards another; rows equal in both keep their bits."""
        return TextBatch(
            torch.lerp(self.sequence, other.sequence, weight),
            torch.lerp(self.pooled, other.pooled, weight),
            self.null_sequence,
            self.null_pooled,
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
    v = backbone.velocity(denoiser, x, sigma, text.sequence, text.pooled)
    if guidance == 1.0:
        return v
    with torch.set_grad_enabled(null_gradient and torch.is_grad_enabled()):
        v_null = backbone.velocity(denoiser, x, sigma, text.null_sequence, text.null_pooled)
    return backbone.guide(v, v_null, guidance)
