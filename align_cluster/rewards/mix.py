"""Many chunks' scores in one table, and their weighted sum.

How the sum becomes an advantage (normalise before or after) is the business of `algorithms/advantage.py`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from align_cluster.rewards.base import RewardSection
from align_cluster.types import Scores, UserError


def concatenate(chunks: Sequence[Scores]) -> Scores:
    """Scores of all N images of the chunks, in order. A column that a chunk lacks is NaN there, a reward not valid."""
    sizes = [_size(scores) for scores in chunks]
    columns = {
        part: {
            name: np.concatenate(
                [
                    getattr(scores, part).get(name, np.full(size, empty))
                    for scores, size in zip(chunks, sizes, strict=True)
                ]
            )
            for name in dict.fromkeys(name for scores in chunks for name in getattr(scores, part))
        }
        for part, empty in (("values", np.nan), ("valid", False), ("details", np.nan))
    }
    failures = {name: message for scores in chunks for name, message in scores.failures.items()}
    return Scores(**columns, failures=failures, seconds=sum(scores.seconds for scores in chunks))


def total(chunks: Sequence[Scores], rewards: Mapping[str, RewardSection]) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sum over the rewards to train on, fp64 [N], and its validity, bool [N]; NaN where not valid.

    A reward that does not apply to a prompt is left out of that prompt's sum, the same for all members of a group. A
    reward that failed masks its images: a sum with a part missing would compare badly with the rest of the group.
    """
    trained = [name for name, config in rewards.items() if config.role == "train"]
    if not trained:
        raise UserError("rewards: all have role 'monitor', so there is nothing to train on; give one role: train")
    sums, valid = [], []
    for scores in chunks:
        ok = np.stack([scores.valid[name] for name in trained])
        parts = np.stack([rewards[name].weight * scores.values[name] for name in trained])
        failed = np.array([name in scores.failures for name in trained])[:, None] & ~ok
        whole = ok.any(0) & ~failed.any(0)
        sums.append(np.where(whole, np.where(ok, parts, 0.0).sum(0), np.nan))
        valid.append(whole)
    return np.concatenate(sums), np.concatenate(valid)


def _size(scores: Scores) -> int:
    return len(next(iter(scores.valid.values())))
