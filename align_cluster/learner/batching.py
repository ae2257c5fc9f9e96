"""Cutting a step into micro-batches: pure functions, so that the work does not depend on the number of ranks."""

import random
from dataclasses import dataclass, replace

import numpy as np

from align_cluster.types import Chunk


@dataclass(frozen=True)
class Piece:
    """One micro-batch: members `start` to `stop` of chunk number `source`, in optimiser update `update` of the step.

    advantages fp32 and weights fp32 (1, or 0 where the sample is masked or the piece is padding), each [stop - start];
    with a critic advantages are [stop - start, N], and returns and values [stop - start, N, R].
    """

    update: int
    source: int
    start: int
    stop: int
    advantages: np.ndarray
    weights: np.ndarray
    returns: np.ndarray | None = None
    values: np.ndarray | None = None


def assign(chunks: int, updates: int, seed: int) -> list[tuple[int, int]]:
    """(update, chunk number) for each chunk of a step: shuffled (seeded), then dealt out evenly."""
    order = list(range(chunks))
    random.Random(seed).shuffle(order)
    return [(position * updates // chunks, chunk) for position, chunk in enumerate(order)]


def cut(
    chunks: list[Chunk],
    advantages: list[np.ndarray],
    valid: list[np.ndarray],
    updates: int,
    micro_batch: int,
    seed: int,
    targets: dict[str, list[np.ndarray]] | None = None,
) -> list[Piece]:
    """Pieces of one step, update by update, cut into micro-batches. `targets` are the returns and values of each chunk,
    where there is a critic."""
    pieces = []
    for update, source in assign(len(chunks), updates, seed):
        for start in range(0, len(chunks[source].seeds), micro_batch):
            stop = min(start + micro_batch, len(chunks[source].seeds))
            weights = valid[source][start:stop].astype(np.float32)
            given = advantages[source][start:stop]
            given = np.where(weights.reshape(-1, *[1] * (given.ndim - 1)) > 0, given, 0).astype(np.float32)
            more = {name: columns[source][start:stop].astype(np.float32) for name, columns in (targets or {}).items()}
            pieces.append(Piece(update, source, start, stop, given, weights, **more))
    return pieces


def share(pieces: list[Piece], rank: int, world: int) -> tuple[list[Piece], list[int]]:
    """One rank's pieces and the chunks that it needs for them; `source` then counts within those chunks.

    A rank gets every world-th piece of each update, padded with weightless copies so that all ranks run as many.
    """
    mine = []
    for update in sorted({piece.update for piece in pieces}):
        of_update = [piece for piece in pieces if piece.update == update]
        rounds = -(-len(of_update) // world)
        for turn in range(rounds):
            index = turn * world + rank
            piece = of_update[index % len(of_update)]
            mine.append(piece if index < len(of_update) else replace(piece, weights=np.zeros_like(piece.weights)))
    sources = sorted({piece.source for piece in mine})
    return [replace(piece, source=sources.index(piece.source)) for piece in mine], sources


def total_weight(pieces: list[Piece]) -> dict[int, float]:
    """Sum of sample weights of each update, over all ranks."""
    totals: dict[int, float] = {}
    for piece in pieces:
        totals[piece.update] = totals.get(piece.update, 0.0) + float(piece.weights.sum())
    return totals
