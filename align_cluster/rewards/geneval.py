"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): are the objects that the prompt names there, as it names them?

The rules are those of GenEval's evaluate_images.py; the graded score is the training reward of Flow-GRPO (Liu et al.
2025, arXiv 2505.05470), without its quirk that a failed position counts one half.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from align_cluster.embedded.detector import Detection, detect
from align_cluster.rewards.base import Result, Reward, RewardSection
from align_cluster.types import Prompt

MAX_OBJECTS = 16  # of one class
POSITION_THRESHOLD = 0.1  # part of the two objects' sizes that an offset must exceed


@dataclass(frozen=True)
class Verdict:
    """What GenEval's rules say of one image.

    accuracy   the benchmark's own verdict: at least the asked number of each class; extra objects do not matter
    strict     as accuracy, and exactly the asked number of each class
    graded     mean over parts of partial credits, at most 1; many extra objects make it negative
    """

    accuracy: bool
    strict: bool
    graded: float


def judge(metadata: dict[str, Any], detections: Sequence[Detection], threshold: float) -> Verdict:
    """Apply a GenEval record to the objects found in one image.

    `metadata` has include: clauses {class, count, color?, position? = [relation, index of another clause]}, and
    optionally exclude: clauses {class, count} of which fewer than count may be there. Objects count above `threshold`;
    of equally confident ones the earlier goes first.
    """
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        same = found.setdefault(detection.label, [])
        if detection.score > threshold and len(same) < MAX_OBJECTS:
            same.append(detection)
    accuracy, _ = _check(metadata["include"], found, exact=False)
    strict, graded = _check(metadata["include"], found, exact=True)
    allowed = all(len(found.get(clause["class"], ())) < clause["count"] for clause in metadata.get("exclude") or ())
    return Verdict(accuracy and allowed, strict and allowed, graded)


def _check(include: list[dict[str, Any]], found: dict[str, list[Detection]], exact: bool) -> tuple[bool, float]:
    """Whether all clauses hold, and the mean of the parts' credits.

    Parts of a clause: its count, then its color and its position where asked. A part counts 0 where an earlier one
    failed. `exact` makes an object too many a failure; the credits are meant for this case.
    """
    parts: list[float] = []
    groups: list[list[Detection] | None] = []  # the objects that satisfy each clause
    for clause in include:
        count, objects = clause["count"], found.get(clause["class"], [])
        parts.append(1 - abs(count - len(objects)) / count)
        holds = len(objects) == count if exact else len(objects) >= count
        if clause.get("color"):
            right = sum(object.color == clause["color"] for object in objects[:count]) if holds else 0
            parts.append(right / count)
            holds = right == count
        groups.append(objects[:count] if holds else None)
    for index, clause in enumerate(include):
        if clause.get("position"):
            relation, target = clause["position"]
            pairs = [(a, b) for a in groups[index] or () for b in groups[target] or ()]
            holds = bool(pairs) and all(relation in relations(a.box, b.box) for a, b in pairs)
            parts.append(float(holds))
            groups[index] = groups[index] if holds else None
    return all(group is not None for group in groups), sum(parts) / len(parts)


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where `box` is as seen from `other` (x0, y0, x1, y1, y down); two relations can hold at once, or none."""
    a, b = (np.asarray(value, dtype=np.float64).reshape(2, 2) for value in (box, other))
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0)
    if np.all(np.abs(shrunk) < 1e-3):
        return set()
    x, y = shrunk / np.linalg.norm(offset)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in held.items() if holds}


class GenEval(Reward):
    """GenEval's verdict as a reward. Prompts without `include` have no verdict."""

    class Config(RewardSection):
        """`score` chooses the reward: `mixed` is half graded, half accuracy. All three stand in the details anyway."""

        kind: Literal["geneval"] = "geneval"
        detector: Literal["embedded"] = "embedded"
        threshold: Annotated[float, Field(ge=0, lt=1)] = 0.80
        score: Literal["graded", "strict", "accuracy", "mixed"] = "graded"

    def load(self, device: str, threads: int) -> None:
        self.detect = detect

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Result:
        valid = np.array([bool(prompt.metadata.get("include")) for prompt in prompts], dtype=bool)
        columns = {name: np.full(len(prompts), np.nan) for name in ("accuracy", "strict", "graded")}
        asked = np.flatnonzero(valid)
        for index, detections in zip(asked, self.detect(images[asked]), strict=True):
            verdict = judge(prompts[index].metadata, detections, self.config.threshold)
            for name, column in columns.items():
                column[index] = getattr(verdict, name)
        chosen = ("graded", "accuracy") if self.config.score == "mixed" else (self.config.score,)
        return Result(sum(columns[name] for name in chosen) / len(chosen), valid, columns)
