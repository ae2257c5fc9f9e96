"""Chunks that tests make by hand."""

from collections.abc import Sequence

from align_cluster.types import Chunk, Prompt, Row


def chunk_of(
    prompt: Prompt,
    seeds: Sequence[int],
    *,
    noises: Sequence[int] | None = None,
    variants: Sequence[int] | None = None,
    step: int = 0,
    number: int = 0,
) -> Chunk:
    """Return a chunk of one prompt: group number `number` of the step, a row a seed."""
    columns = zip(seeds, noises or seeds, variants or [0] * len(seeds), strict=True)
    rows = tuple(Row(prompt, number, member, *own) for member, own in enumerate(columns))
    return Chunk(step, number, rows)
