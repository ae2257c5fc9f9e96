"""The world of the embedded model: its prompts, what each one asks for, and which ones are held out.

Prompts carry GenEval metadata (`tag`, `include`, `exclude`), so the renderer, the reward rules and the evaluation read
the same record. Every task is a finite list in a fixed order. The held-out part of a task has the prompts with the
smallest hashes, so it never depends on a seed.
"""

import hashlib
import random
from functools import cache
from itertools import permutations, product

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
COLORS = {
    "red": (218, 38, 38),
    "orange": (244, 138, 24),
    "yellow": (244, 224, 56),
    "green": (44, 164, 66),
    "blue": (40, 84, 214),
    "purple": (142, 52, 186),
    "white": (250, 250, 250),
    "black": (22, 22, 22),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
MEDIA = ("photo", "picture", "drawing")
BACKGROUNDS = {"": 0.60, " on a light background": 0.76, " on a dark background": 0.40}
SIZES = {"": 12, "small ": 8, "large ": 15}
WORDS = tuple(
    "GO NO UP HI OK IN ON BY MY WE ART BAR BUS CAB CAT CUP DAY EGG FUN GAS HAT ICE JAM KEY LAB MAP "
    "NEW OIL PUB RUN SKI TAX USA VAN WAX YES ZOO INN PIE TEA".split()
)
TASKS = ("single_object", "colors", "two_object", "counting", "position", "color_attr", "ocr")
HELD_OUT_AT_LEAST, HELD_OUT_PART = 60, 0.10


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _record(tag: str, prompt: str, include: list[dict], exclude: list[dict] | None = None, **extra) -> dict:
    return {"tag": tag, "prompt": prompt, "include": include, "exclude": exclude or [], **extra}


def _single_object():
    for medium, size, shape, ground in product(MEDIA, SIZES, SHAPES, BACKGROUNDS):
        yield _record("single_object", f"a {medium} of {_a(size + shape)}{ground}", [{"class": shape, "count": 1}])


def _colors():
    for medium, size, color, shape, ground in product(MEDIA, SIZES, COLORS, SHAPES, BACKGROUNDS):
        include = [{"class": shape, "count": 1, "color": color}]
        yield _record("colors", f"a {medium} of {_a(f'{size}{color} {shape}')}{ground}", include)


def _two_object():
    for medium, (first, second), ground in product(MEDIA, permutations(SHAPES, 2), BACKGROUNDS):
        include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
        yield _record("two_object", f"a {medium} of {_a(first)} and {_a(second)}{ground}", include)


def _counting():
    for medium, count, shape, ground in product(MEDIA, NUMBERS, SHAPES, BACKGROUNDS):
        prompt = f"a {medium} of {NUMBERS[count]} {PLURALS[shape]}{ground}"
        exclude = [{"class": shape, "count": count + 1}]
        yield _record("counting", prompt, [{"class": shape, "count": count}], exclude)


def _position():
    for medium, (first, second), relation, ground in product(MEDIA, permutations(SHAPES, 2), RELATIONS, BACKGROUNDS):
        include = [
            {"class": second, "count": 1},
            {"class": first, "count": 1, "position": [relation, 0]},
        ]
        yield _record("position", f"a {medium} of {_a(first)} {relation} {_a(second)}{ground}", include)


def _color_attr():
    for medium, shapes, colors in product(MEDIA, permutations(SHAPES, 2), permutations(COLORS, 2)):
        include = [{"class": shape, "count": 1, "color": color} for shape, color in zip(shapes, colors, strict=True)]
        pair = " and ".join(_a(f"{clause['color']} {clause['class']}") for clause in include)
        yield _record("color_attr", f"a {medium} of {pair}", include)


def _ocr():
    for word, ground in product(WORDS, BACKGROUNDS):
        yield _record("ocr", f'a sign that says "{word}"{ground}', [], text=word)


_GENERATORS = dict(
    zip(TASKS, (_single_object, _colors, _two_object, _counting, _position, _color_attr, _ocr), strict=True)
)


def _hash(record: dict) -> str:
    return hashlib.sha256(record["prompt"].encode()).hexdigest()


@cache
def prompts(task: str, split: str) -> tuple[dict, ...]:
    """Return all metadata records of one task in one split ("train" or "held_out"), in a fixed order.

    At least 60 prompts of each task (10 % if that is more) are held out; training never sees them. Raises ValueError
    for an unknown task or split.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: the embedded world has {', '.join(TASKS)}")
    if split not in ("train", "held_out"):
        raise ValueError(f"unknown split {split!r}: it is 'train' or 'held_out'")
    by_hash = sorted(_GENERATORS[task](), key=_hash)
    cut = max(HELD_OUT_AT_LEAST, int(HELD_OUT_PART * len(by_hash)))
    return tuple(by_hash[:cut] if split == "held_out" else by_hash[cut:])


def background(record: dict) -> float:
    """Return the grey level in [0, 1] that the prompt asks for."""
    return next(level for words, level in reversed(BACKGROUNDS.items()) if record["prompt"].endswith(words))


def layout(record: dict, rng: random.Random) -> list[tuple[str, str, int, int, int]]:
    """Draw one placement that satisfies `record`: a list of (shape, color, cx, cy, radius) in pixels.

    One object is in the middle; several take quadrants of the 48 x 48 canvas. Places and sizes are few, because a model
    of this size draws clean shapes only if it has seen them often.
    """
    clauses = [clause for clause in record["include"] for _ in range(clause["count"])]
    if len(clauses) == 1:
        words = record["prompt"].split()
        radius = SIZES["small "] if "small" in words else SIZES["large "] if "large" in words else SIZES[""]
        spots = [(24, 24)]
    else:
        radius, spots = 9, _quadrants(clauses, rng)
    if record["tag"] == "counting":
        colors = [rng.choice(tuple(COLORS))] * len(clauses)
    else:
        free = iter(rng.sample([c for c in COLORS if all(c != k.get("color") for k in clauses)], len(clauses)))
        colors = [clause.get("color") or next(free) for clause in clauses]
    return [
        (clause["class"], color, x, y, radius) for clause, color, (x, y) in zip(clauses, colors, spots, strict=True)
    ]


def _quadrants(clauses: list[dict], rng: random.Random) -> list[tuple[int, int]]:
    relation = next((clause["position"][0] for clause in clauses if "position" in clause), None)
    if relation is None:
        return rng.sample(list(product((12, 36), (12, 36))), len(clauses))
    line = rng.choice((12, 36))  # both objects on one row or column; clause 0 is the one referred to
    target, subject = (36, 12) if relation in ("left of", "above") else (12, 36)
    across = relation in ("left of", "right of")
    return [(target, line), (subject, line)] if across else [(line, target), (line, subject)]
