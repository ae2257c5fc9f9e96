"""Training prompts in GenEval's format: the 80 COCO class names, 10 colours and six tasks of arXiv 2310.11513.

The wording follows the published evaluation set, its naive plurals included ("benchs"), because models are evaluated
on that wording. Prompts that describe the same scene ("a cat and a dog", "a dog and a cat"; "a cat left of a dog",
"a dog right of a cat") are in the same split and are excluded together.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import cycle, islice
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from align_cluster.errors import UserError
from align_cluster.prompts.base import PromptSource
from align_cluster.prompts.files import RELATIONS, JsonlPrompts
from align_cluster.settings import Root, Section
from align_cluster.types import Prompt

_NAMES = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign "
    "parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie "
    "suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard "
    "tennis_racket bottle wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot "
    "hot_dog pizza donut cake chair couch potted_plant bed dining_table toilet tv laptop computer_mouse tv_remote "
    "computer_keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors teddy_bear "
    "hair_drier toothbrush"
)
CLASSES = tuple(name.replace("_", " ") for name in _NAMES.split())
THINGS = CLASSES[1:]  # GenEval asks for no coloured persons
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = {2: "two", 3: "three", 4: "four"}
HELD_OUT_ONE_IN = 10

Record = dict[str, Any]


def _a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _pair(index: int, count: int) -> tuple[int, int]:
    """The index-th ordered pair of two different numbers below `count`."""
    first, second = divmod(index, count - 1)
    return first, second + (second >= first)


def _single_object(index: int) -> Record:
    include = [{"class": CLASSES[index], "count": 1}]
    return {"tag": "single_object", "include": include, "prompt": f"a photo of {_a(CLASSES[index])}"}


def _two_object(index: int) -> Record:
    first, second = (CLASSES[i] for i in _pair(index, len(CLASSES)))
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    return {"tag": "two_object", "include": include, "prompt": f"a photo of {_a(first)} and {_a(second)}"}


def _counting(index: int) -> Record:
    which, extra = divmod(index, len(NUMBERS))
    name, count = CLASSES[which], 2 + extra
    plural = name + ("es" if name.endswith("s") else "s")
    return {
        "tag": "counting",
        "include": [{"class": name, "count": count}],
        "exclude": [{"class": name, "count": count + 1}],
        "prompt": f"a photo of {NUMBERS[count]} {plural}",
    }


def _colors(index: int) -> Record:
    which, color = divmod(index, len(COLORS))
    name, color = THINGS[which], COLORS[color]
    include = [{"class": name, "count": 1, "color": color}]
    return {"tag": "colors", "include": include, "prompt": f"a photo of {_a(color)} {name}"}


def _position(index: int) -> Record:
    pair, relation = divmod(index, len(RELATIONS))
    first, second = (CLASSES[i] for i in _pair(pair, len(CLASSES)))
    relation = RELATIONS[relation]
    include = [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]
    return {"tag": "position", "include": include, "prompt": f"a photo of {_a(first)} {relation} {_a(second)}"}


def _color_attr(index: int) -> Record:
    things, colors = divmod(index, len(COLORS) * (len(COLORS) - 1))
    names = [THINGS[i] for i in _pair(things, len(THINGS))]
    tints = [COLORS[i] for i in _pair(colors, len(COLORS))]
    include = [{"class": name, "count": 1, "color": tint} for name, tint in zip(names, tints, strict=True)]
    text = " and ".join(f"{_a(tint)} {name}" for name, tint in zip(names, tints, strict=True))
    return {"tag": "color_attr", "include": include, "prompt": f"a photo of {text}"}


# Task -> (number of distinct prompts, the prompt of an index).
TASKS: dict[str, tuple[int, Callable[[int], Record]]] = {
    "single_object": (80, _single_object),
    "two_object": (80 * 79, _two_object),
    "counting": (80 * 3, _counting),
    "colors": (79 * 10, _colors),
    "position": (80 * 79 * 4, _position),
    "color_attr": (79 * 78 * 10 * 9, _color_attr),
}


def scene(record: Record) -> str:
    """Return the identity of the scene that a record describes, whatever the order of the objects in the sentence."""
    clauses = [[clause["class"], clause["count"], clause.get("color")] for clause in record["include"]]
    position = next((clause["position"] for clause in record["include"] if clause.get("position")), None)
    if position is None:
        return json.dumps(sorted(clauses, key=str))
    relation, target = position
    subject = next(i for i, clause in enumerate(record["include"]) if clause.get("position"))
    ends = [clauses[subject], clauses[target]]
    if relation in ("right of", "below"):
        relation, ends = {"right of": "left of", "below": "above"}[relation], ends[::-1]
    return json.dumps([relation, *ends])


def _held_out(identity: str) -> bool:
    digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


class GenevalPrompts(PromptSource):
    """Generates `count` prompts, split over the tasks by `ratios`, in an order that follows from `seed`.

    Some tasks are small (counting has 240 prompts). No prompt repeats before all prompts of its task have come once.
    """

    class Config(Section):
        """Configures generated GenEval prompts."""

        kind: Literal["geneval"] = "geneval"
        count: PositiveInt = 50_000
        """The number of prompts. Prompts of a task repeat only after all of them have come once. The default is the
        size of Flow-GRPO's training set."""
        seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
        """The seed that chooses and orders the prompts of each task. It does not change the split."""
        split: Literal["train", "held_out", "all"] = "train"
        """Which scenes may occur: `held_out` has one scene in ten whatever the seed, `train` has the others, and `all`
        has both."""
        exclude: str | None = None
        """A metadata file (jsonl), such as GenEval's own evaluation set, whose scenes never occur. null excludes
        nothing. Give it where the run is measured on that set."""
        ratios: dict[Literal[tuple(TASKS)], NonNegativeInt] = {
            "position": 7,
            "counting": 5,
            "color_attr": 3,
            "colors": 1,
            "two_object": 1,
            "single_object": 0,
        }
        """The share of each task in `count`, as whole numbers; 0 leaves a task out. A task that is not named has none.
        The default is Flow-GRPO's 7:5:3:1:1:0, which favours what the base model finds hard."""

        @field_validator("ratios")
        @classmethod
        def some_task_counts(cls, ratios: dict[str, int]) -> dict[str, int]:
            """Refuse ratios that are all 0."""
            if not any(ratios.values()):
                raise ValueError("a mapping from task to a whole number, at least one of them above 0")
            return ratios

        def problems(self, where: str, run: Root) -> Iterator[str]:
            """Refuse the embedded model, which never saw these objects."""
            if run.backbone.path == "embedded":
                yield (
                    f"{where}.kind is geneval, whose objects the embedded model never saw; set it to embedded, "
                    "or set backbone.path to a real model"
                )

    def load(self) -> list[Prompt]:
        """Return the prompts, task by task. Raises UserError if `exclude` leaves a task without prompts."""
        banned = self._banned()
        prompts: list[Prompt] = []
        known = 0
        for task, wanted in shares(self.config.count, self.config.ratios).items():
            records = _pool(task, wanted, self.config.split, self.config.seed, banned)
            pool = [Prompt(known + i, record["prompt"], record) for i, record in enumerate(records)]
            if wanted and not pool:
                raise UserError(
                    f"prompts of kind geneval: every {task} prompt is excluded by {self.config.exclude}; "
                    f"set ratios.{task} to 0"
                )
            known += len(pool)
            prompts += islice(cycle(pool), wanted)
        return prompts

    def _banned(self) -> frozenset[str]:
        if self.config.exclude is None:
            return frozenset()
        return frozenset(scene(p.metadata) for p in JsonlPrompts(JsonlPrompts.Config(path=self.config.exclude)).load())


@lru_cache(maxsize=32)  # `validate` and the run itself ask for the same prompts
def _pool(task: str, wanted: int, split: str, seed: int, banned: frozenset[str]) -> tuple[Record, ...]:
    """Return up to `wanted` distinct records of a task, shuffled by `seed`.

    It uses RandomState, because NumPy promises never to change that generator's stream.
    """
    if not wanted:
        return ()
    size, make = TASKS[task]
    pool: list[Record] = []
    for index in np.random.RandomState([seed, list(TASKS).index(task)]).permutation(size):
        record = {"exclude": [], **make(int(index))}
        identity = scene(record)
        if identity in banned or (split != "all" and _held_out(identity) != (split == "held_out")):
            continue
        pool.append(record)
        if len(pool) == wanted:
            break
    return tuple(pool)


def shares(count: int, ratios: dict[str, int]) -> dict[str, int]:
    """Divide `count` by `ratios`. The largest remainders get what rounding leaves over."""
    total = sum(ratios.values())
    parts = {task: count * ratio // total for task, ratio in ratios.items()}
    by_remainder = sorted(ratios, key=lambda task: -(count * ratios[task] % total))
    for task in by_remainder[: count - sum(parts.values())]:
        parts[task] += 1
    return parts
