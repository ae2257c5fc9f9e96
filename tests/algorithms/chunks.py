"""Chunks for tests that care about nothing but seeds."""

from collections.abc import Iterable

from align_cluster.types import Chunk, Prompt, Row


def chunk_of(seeds: Iterable[int], step: int = 0) -> Chunk:
    """A chunk of one prompt, with one row a seed."""
    return Chunk(step, 0, tuple(Row(Prompt(0, ""), 0, member, seed, seed) for member, seed in enumerate(seeds)))
