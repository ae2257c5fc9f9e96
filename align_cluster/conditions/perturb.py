"""E2PO's first phase: learn perturbed token embeddings that spread a prompt's global embedding around the original.

The text encoder is frozen, and each prompt learns V perturbations of its content tokens,
K - 1 beside the original or, without the anchor, K. The sampler does the
second phase, the rollouts under these perturbations.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from align_cluster.conditions.exploration import E2po
from align_cluster.conditions.precision import to_array
from align_cluster.streams import hashed, stream
from align_cluster.types import Perturbation

BATCH = 32  # prompts that one optimisation learns together
ROUND = 8  # tokens; a sequence is cut after its end token, at a multiple of this


def learn(
    encoder: torch.nn.Module,
    tokenizer: Callable[..., Any],
    texts: Sequence[str],
    keys: Sequence[str],
    config: E2po,
    seed: int,
    layer: int | None = -2,
) -> list[Perturbation]:
    """Learn the perturbations of prompts with a frozen CLIP text encoder, in fp32.

    `keys` are the content addresses of the results. `layer` is the hidden state that enters a condition's sequence, as
    for SD3; None is the encoder's normalised output.

    A prompt's result does not depend on the other prompts of the call. On a CPU with one thread it is equal bit by bit,
    for encoders with a width that is a multiple of 32. A prompt without content tokens keeps its original encoding.
    """
    ids, content = tokenize(tokenizer, texts)
    width = encoder.get_input_embeddings().embedding_dim
    count = config.variants
    noise = [
        initial_noise(text, seed, count, row, width, config.init) for text, row in zip(texts, content, strict=True)
    ]
    ids, content, deltas = (tensor.to(encoder.device) for tensor in (ids, content, torch.stack(noise)))
    precise = encoder if encoder.dtype == torch.float32 else copy.deepcopy(encoder).float()
    for members, length in batches(tokenizer, ids) if count else ():
        part = (members, slice(length))
        deltas[members, :, :length] = optimise(precise, ids[part], content[part], deltas[members, :, :length], config)
    return [render(encoder, *each, config, layer) for each in zip(keys, ids, deltas, strict=True)]


def tokenize(tokenizer: Callable[..., Any], texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, content mask), both [P, S], padded and truncated as the stock pipelines do.

    Content tokens stand before the first end token and are not the begin token. Attention is causal, so later tokens
    cannot reach the embedding, which is read at the end token.
    """
    length = tokenizer.model_max_length
    ids = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids, ((ids == tokenizer.eos_token_id).cumsum(-1) == 0) & (ids != tokenizer.bos_token_id)


def initial_noise(text: str, seed: int, count: int, content: torch.Tensor, width: int, scale: float) -> torch.Tensor:
    """Draw Gaussian perturbations [count, S, width] on the content tokens of one prompt; other tokens get 0.

    The seed is a hash of (seed, text).
    """
    generator = stream(hashed(f"{seed}/{text}"))
    noise = torch.zeros(count, len(content), width)
    noise[:, content] = scale * torch.randn(count, int(content.sum()), width, generator=generator)
    return noise


def batches(tokenizer: Callable[..., Any], ids: torch.Tensor) -> Iterator[tuple[list[int], int]]:
    """Yield (prompt indices, sequence length) of each batch.

    A prompt's length depends on that prompt alone, so its results do too. Without padding, short prompts cost up to ten
    times less.
    """
    ends = (ids == tokenizer.eos_token_id).int().argmax(-1).tolist()
    lengths = [min(-(-(end + 1) // ROUND) * ROUND, ids.shape[1]) for end in ends]
    for length in sorted(set(lengths)):
        members = [index for index, own in enumerate(lengths) if own == length]
        for first in range(0, len(members), BATCH):
            yield members[first : first + BATCH], length


def optimise(
    encoder: torch.nn.Module, ids: torch.Tensor, content: torch.Tensor, noise: torch.Tensor, config: E2po
) -> torch.Tensor:
    """Return learned perturbations [P, V, S, d] that start from `noise`; ids and content are [P, S].

    The loss is a sum over prompts, and gradients are clipped prompt by prompt, so prompts do not influence each other.
    """
    prompts, count = noise.shape[:2]
    mask = content[:, None, :, None]
    deltas = noise.clone().requires_grad_()
    optimizer = torch.optim.AdamW([deltas], lr=config.lr, weight_decay=0, fused=True)
    repeated = ids.repeat_interleave(count, 0)
    with LinearPerPrompt(prompts):
        with torch.no_grad():
            anchor = F.normalize(forward(encoder, ids, config)[2], dim=-1)
        for _ in range(config.iterations):
            with perturbed(encoder, (deltas * mask).flatten(0, 1)):
                embedding = forward(encoder, repeated, config)[2]
            loss = objective(F.normalize(embedding, dim=-1).unflatten(0, (prompts, count)), anchor, config)
            optimizer.zero_grad()
            loss.sum().backward()
            if config.bound == "grad_norm":
                shrink(deltas.grad, config.radius, (1, 2, 3))
            optimizer.step()
            with torch.no_grad():
                if config.bound == "token_l2":
                    shrink(deltas, config.radius, (3,))
                elif config.bound == "inf":
                    deltas.clamp_(-config.radius, config.radius)
    return deltas.detach()


def objective(embeddings: torch.Tensor, anchor: torch.Tensor, config: E2po) -> torch.Tensor:
    """Return the loss of each prompt [P] for unit vectors [P, V, D] and anchors [P, D].

    It is diversity L_div + L_anc: L_div is the mean cosine over pairs of variants, a single variant's being that with
    the original, and L_anc is how far their cosines
    to the anchor lie outside mu +- margin.
    """
    count = embeddings.shape[1]
    to_anchor = (embeddings * anchor[:, None]).sum(-1)
    outside = ((to_anchor - config.mu).abs() - config.margin).clamp(min=0).sum(-1)
    if count < 2:  # the prompt's only pair of conditions: the variant and the original
        return config.diversity * to_anchor.sum(-1) + outside
    pairs = (embeddings @ embeddings.mT).triu(1).sum((-2, -1))
    return config.diversity * pairs / (count * (count - 1) / 2) + outside


def shrink(values: torch.Tensor, radius: float, dims: tuple[int, ...]) -> None:
    """Scale values down to the radius, in place, where their L2 norm over `dims` exceeds it."""
    norm = torch.linalg.vector_norm(values, dim=dims, keepdim=True)
    values.mul_((radius / norm).clamp(max=1))  # a norm of 0 gives inf, hence 1


@contextmanager
def perturbed(encoder: torch.nn.Module, deltas: torch.Tensor) -> Iterator[None]:
    """Add deltas to the token embeddings of all forward passes inside the block, before the position embedding."""
    handle = encoder.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: (output + deltas).to(output.dtype)
    )
    try:
        yield
    finally:
        handle.remove()


def forward(
    encoder: torch.nn.Module, ids: torch.Tensor, config: E2po, layer: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (hidden state [B, S, d], embedding that enters `pooled`, embedding that cosines compare).

    The hidden state is that of `layer`, or the normalised output for None. The second value is the projected embedding.
    An encoder without a projection returns the pooled embedding for both.
    """
    model = getattr(encoder, "text_model", encoder)
    output = model(input_ids=ids, output_hidden_states=layer is not None)
    pooled = output.pooler_output
    projected = encoder.text_projection(pooled) if hasattr(encoder, "text_projection") else pooled
    hidden = output.last_hidden_state if layer is None else output.hidden_states[layer]
    return hidden, projected, projected if config.embedding == "projected" else pooled


@torch.no_grad()
def render(
    encoder: torch.nn.Module, key: str, ids: torch.Tensor, deltas: torch.Tensor, config: E2po, layer: int | None = -2
) -> Perturbation:
    """Encode one prompt, ids [S], under deltas [V, S, d].

    Each variant takes a forward pass of its own, as in the stock pipeline, so an unperturbed encoding has the stock
    bits.
    """
    encoded = []
    for delta in (deltas.new_zeros(deltas.shape[1:]), *deltas):
        with perturbed(encoder, delta):
            encoded.append(forward(encoder, ids[None], config, layer))
    hidden, pooled, embedding = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    embedding = embedding.float().cpu().numpy()
    unit = embedding / np.linalg.norm(embedding.astype(np.float64), axis=1, keepdims=True)
    cosines = unit @ unit.T
    pairs = cosines[1:, 1:][np.triu_indices(len(deltas), 1)]
    variants = to_array(hidden[1:]), to_array(pooled[1:])
    return Perturbation(key, *variants, cosines[0, 1:], float(pairs.mean()) if len(pairs) else float("nan"))


def beside(parts: Sequence[Perturbation]) -> Perturbation:
    """Join what several encoders of one prompt have learned, channel by channel in their order; cosines are means."""
    return Perturbation(
        parts[0].key,
        np.concatenate([part.hidden for part in parts], -1),
        np.concatenate([part.pooled for part in parts], -1),
        np.mean([part.cosines for part in parts], 0),
        float(np.mean([part.pairwise for part in parts])),
    )


class LinearPerPrompt(TorchFunctionMode):
    """Run each linear layer as one matrix product a prompt.

    A product over a whole batch chooses its kernel by the number of rows, so the last bits would change with the number
    of prompts.
    """

    def __init__(self, prompts: int) -> None:
        super().__init__()
        self.prompts = prompts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, weight, bias = args
        rows = x.reshape(self.prompts, -1, x.shape[-1])
        matrices = weight.t().expand(self.prompts, -1, -1)
        product = torch.bmm(rows, matrices) if bias is None else torch.baddbmm(bias, rows, matrices)
        return product.view(*x.shape[:-1], -1)
