"""Attention on CPUs, where the backward pass of PyTorch's own kernel takes six times longer than plain products."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

MOST_SCORES = 256 * 256  # of one head: above, the table of all scores no longer pays


class ShortAttention(TorchFunctionMode):
    """Computes attention over short sequences on a CPU by plain matrix products, inside the context.

    Scores and their softmax are fp32, as in PyTorch's kernel, which this replaces in forward and backward passes alike.
    Longer sequences, masks and other devices keep PyTorch's kernel.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Replace attention that qualifies, and call everything else as it is."""
        if func is scaled_dot_product_attention and _qualifies(*args, **(kwargs or {})):
            return _attend(*(args or (kwargs["query"], kwargs["key"], kwargs["value"]))[:3])
        return func(*args, **(kwargs or {}))


def _qualifies(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> bool:
    plain = attn_mask is None and not (dropout_p or is_causal or any(others.values()))
    return plain and query.device.type in ("cpu", "meta") and query.shape[-2] * key.shape[-2] <= MOST_SCORES


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = (query.float() * query.shape[-1] ** -0.5) @ key.float().mT
    return torch.softmax(scores, -1).to(value.dtype) @ value


def shorten_attention(model: torch.nn.Module) -> None:
    """Let the attention layers of a diffusers model compute inside `ShortAttention`.

    The layers themselves do it, so that activations that a backward pass computes again come out alike.
    """
    for layer in model.modules():
        if hasattr(layer, "processor"):
            layer.forward = _inside(layer.forward)


def _inside(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def shortened(*args: Any, **kwargs: Any) -> Any:
        with ShortAttention():
            return forward(*args, **kwargs)

    return shortened
