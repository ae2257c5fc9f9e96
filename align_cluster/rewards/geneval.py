"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): does the image show the objects that the prompt names?

The rules are those of GenEval's evaluate_images.py. The graded score is the training reward of Flow-GRPO (Liu et al.
2025, arXiv 2505.05470). `detectors.py` finds the objects, and `colors.py` names their colours if the detector does not.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from align_cluster.embedded.detector import Detection
from align_cluster.kinds import one_of
from align_cluster.rewards.base import Bounds, ModelSize, Result, Reward, RewardSection, malformed
from align_cluster.rewards.clip import CLIP_L, CLIPS
from align_cluster.rewards.colors import ColorNamer, cutout
from align_cluster.rewards.detectors import DETECTORS, Embedded, geneval_name
from align_cluster.rewards.loading import OPEN_CLIP, model_size
from align_cluster.types import Prompt

MAX_OBJECTS = 16  # objects of one class that count, as in GenEval
POSITION_THRESHOLD = 0.1  # an offset must exceed this fraction of the two objects' sizes


@dataclass(frozen=True)
class Verdict:
    """Holds the result of GenEval's rules for one image.

    accuracy   the benchmark's own verdict: at least the requested number of each class; extra objects do not matter
    strict     as accuracy, and exactly the requested number of each class
    graded     mean over parts of partial credits, at most 1; many extra objects make it negative
    """

    accuracy: bool
    strict: bool
    graded: float


def strongest(detections: Sequence[Detection], threshold: float) -> dict[str, list[Detection]]:
    """Return the objects that count, by class: at most 16 above `threshold`, the most confident first.

    Among equally confident objects the earlier one comes first.
    """
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        same = found.setdefault(detection.label, [])
        if detection.score > threshold and len(same) < MAX_OBJECTS:
            same.append(detection)
    return found


def judge(
    metadata: dict[str, Any], detections: Sequence[Detection], threshold: float, half_credit: bool = False
) -> Verdict:
    """Apply a GenEval record to the objects found in one image.

    `metadata` has include: clauses {class, count, color?, position? = [relation, index of another clause]}, and
    optionally exclude: clauses {class, count}, with fewer than count objects allowed. Objects count above `threshold`.
    `half_credit` repeats a slip of Flow-GRPO's reward server: present objects in a wrong position add a part of 0 and
    one of 1 to the graded score, where one of 0 was meant.
    """
    found = strongest(detections, threshold)
    accuracy, _ = _check(metadata["include"], found, exact=False, half_credit=half_credit)
    strict, graded = _check(metadata["include"], found, exact=True, half_credit=half_credit)
    allowed = all(len(found.get(clause["class"], ())) < clause["count"] for clause in metadata.get("exclude") or ())
    return Verdict(accuracy and allowed, strict and allowed, graded)


def _check(
    include: list[dict[str, Any]], found: dict[str, list[Detection]], exact: bool, half_credit: bool
) -> tuple[bool, float]:
    """Return whether all clauses hold, and the mean of the parts' credits.

    Parts of a clause are its count, then its color and its position if it has them. A part counts 0 if an earlier one
    failed. `exact` makes an extra object a failure; the credits are meant for this case.
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
            parts += [0.0, 1.0] if half_credit and pairs and not holds else [float(holds)]
            groups[index] = groups[index] if holds else None
    return all(group is not None for group in groups), sum(parts) / len(parts)


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Return where `box` is as seen from `other` (x0, y0, x1, y1, y down); none, one or two relations hold."""
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
    """Checks an image against its prompt by GenEval's rules on detected objects.

    Prompts without `include` have no score. The details report all three verdicts, whatever `score` is.
    """

    class Config(RewardSection):
        """Configures GenEval. It scores only prompts that name objects: those of kind embedded, geneval and jsonl."""

        reads = {"color_clip": OPEN_CLIP}
        kind: Literal["geneval"] = "geneval"
        detector: one_of(DETECTORS) = Embedded.Config()
        """The model that finds objects, as a block or as the name of its kind alone. `embedded` knows the embedded
        world only; photographs need `mask2former`, which is GenEval's kind, or `detr`."""
        threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
        """The confidence that an object must exceed to count. null takes the detector's own: GenEval's 0.3 for
        photographs, and 0.8 for the embedded world."""
        counting_threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
        """The same for prompts that ask for a number. null takes the detector's own, GenEval's 0.9 for photographs; the
        embedded detector takes `threshold`."""
        color_clip: str | None = None
        """The CLIP that names colours for detectors that do not: a hub id or a folder of an open_clip model. null takes
        OpenAI's ViT-L/14, as GenEval does."""
        score: Literal["graded", "strict", "accuracy", "mixed"] = "graded"
        """The verdict that becomes the reward: `graded` is the mean of partial credits, Flow-GRPO's training reward.
        `accuracy` is the benchmark's own 0 or 1, `strict` also refuses extra objects, and `mixed` is half graded, half
        accuracy. Reports show all three."""
        half_credit: bool = False
        """Whether objects in a wrong position get half of the position's credit, as a slip of Flow-GRPO's reward server
        gives it. Set it to true only to reproduce that server."""

        @field_validator("detector", mode="before")
        @classmethod
        def kind_alone(cls, value: Any) -> Any:
            """Accept the name of a detector's kind in place of its settings."""
            return {"kind": value} if isinstance(value, str) else value

    needs = "it needs metadata with include clauses, as prompts of kind embedded, geneval and jsonl have"
    metadata = {
        "include": 'objects that an image must show: [{"class": "circle", "count": 1, "color": "red"}, ...]',
        "exclude": 'objects that it must show fewer of: [{"class": "star", "count": 1}, ...]',
        "tag": "the name of the prompt's task; counting has a threshold of its own",
    }
    headline = "graded"

    @classmethod
    def judges(cls, prompt: Prompt) -> bool:
        """Return whether the prompt names objects."""
        return bool(prompt.metadata.get("include"))

    @property
    def bounds(self) -> Bounds:
        """0 and 1, or without an end below: many extra objects make the graded score negative."""
        return (None if self.config.score in ("graded", "mixed") else 0.0), 1.0

    def prompt_problems(self, where: str, prompts: Iterable[Prompt]) -> Iterator[str]:
        """Refuse prompts that ask for objects that the detector does not know."""
        detector = DETECTORS[self.config.detector.kind]
        known = detector.classes
        asked = {clause["class"] for prompt in prompts for clause in prompt.metadata.get("include", ())}
        for unknown in sorted(asked - set(known))[:1]:
            vocabulary = ", ".join(known) if len(known) < 10 else f"{len(known)} classes of COCO by GenEval's names"
            name = geneval_name(unknown)
            yield (
                f"{where}: the {self.config.detector.kind} detector knows {vocabulary}, and prompts ask for "
                f"{unknown!r}; {f'write {name!r}' if name in known else detector.remedy}"
            )

    def model_sizes(self) -> list[ModelSize | None]:
        """Return the sizes of the detector and, where it tells no colours, of the CLIP that names them."""
        detector, color_clip = DETECTORS[self.config.detector.kind](self.config.detector), self.config.color_clip
        colors = [CLIP_L if color_clip is None else model_size(color_clip, CLIPS)]
        return detector.model_sizes() + ([] if detector.tells_colors else colors)

    def load(self, device: str, threads: int) -> None:
        """Load the detector and, if it does not tell colours, the CLIP that names them."""
        self.detector = DETECTORS[self.config.detector.kind](self.config.detector)
        self.detector.load(device)
        self.name_colors = None if self.detector.tells_colors else ColorNamer(self.config.color_clip, device)

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Result:
        """Judge the images with an `include`; the others stay invalid. Records that break GenEval's format fail."""
        failure = malformed(prompts, tuple(self.metadata))
        valid = np.array([self.judges(prompt) for prompt in prompts], dtype=bool)
        valid[list(failure.rows if failure else ())] = False
        columns = {name: np.full(len(prompts), np.nan) for name in ("accuracy", "strict", "graded")}
        asked = np.flatnonzero(valid)
        for index, detections in zip(asked, self._detections(images[asked], [prompts[i] for i in asked]), strict=True):
            threshold = self._threshold(prompts[index])
            verdict = judge(prompts[index].metadata, detections, threshold, self.config.half_credit)
            for name, column in columns.items():
                column[index] = getattr(verdict, name)
        chosen = ("graded", "accuracy") if self.config.score == "mixed" else (self.config.score,)
        return Result(sum(columns[name] for name in chosen) / len(chosen), valid, columns, failure)

    def _threshold(self, prompt: Prompt) -> float:
        counting = self._setting("counting_threshold")
        return counting if counting is not None and prompt.task == "counting" else self._setting("threshold")

    def _setting(self, name: str) -> float | None:
        """Return the run's value, or else the detector's own."""
        value = getattr(self.config, name)
        return getattr(self.detector, name) if value is None else value

    def _detections(self, images: np.ndarray, prompts: list[Prompt]) -> list[list[Detection]]:
        """Return the objects in each image; those with a colour that the verdict depends on have one."""
        thresholds = [self._threshold(prompt) for prompt in prompts]
        found = self.detector.detect(images, min(thresholds, default=0.0))
        if self.name_colors is None:
            return found
        wanted = [
            (image, detection)
            for image, prompt, detections, threshold in zip(images, prompts, found, thresholds, strict=True)
            for detection in colored(prompt.metadata["include"], strongest(detections, threshold))
        ]
        names = self.name_colors([cutout(*pair) for pair in wanted], [detection.label for _, detection in wanted])
        colors = dict(zip((detection for _, detection in wanted), names, strict=True))
        return [[replace(d, color=colors[d]) if d in colors else d for d in detections] for detections in found]


def colored(include: list[dict[str, Any]], found: dict[str, list[Detection]]) -> list[Detection]:
    """Return the objects with a colour that the clauses check.

    They are the most confident ones of each class, if enough of them were found.
    """
    wanted: dict[Detection, None] = {}
    for clause in include:
        objects = found.get(clause["class"], [])
        if clause.get("color") and len(objects) >= clause["count"]:
            wanted |= dict.fromkeys(objects[: clause["count"]])
    return list(wanted)
