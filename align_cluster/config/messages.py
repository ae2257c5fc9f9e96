"""pydantic's validation errors as sentences: where, what is wrong, and the nearest thing that is right."""

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from align_cluster.config.run import RunConfig
from align_cluster.kinds import kind_of
from align_cluster.settings import masked

# What is allowed, by pydantic's error type; a field of the error's context may fill a bracket.
ALLOWED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text; put it in quotes if it looks like something else",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "made of letters, digits, dashes, underscores and, inside of it, dots",
    "string_too_long": "text of at most {max_length} characters",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "a list or mapping with at least {min_length} entry",
    "too_long": "a list of at most {max_length} entries",
    "tuple_type": "a list in [brackets]",
    "list_type": "a list in [brackets]",
    "dict_type": "a mapping",
    "literal_error": "{expected}",
    "value_error": "{error}",
}
YAML_WORDS = {"None": "null", "True": "true", "False": "false"}
# Settings of earlier versions: what they are called now, and what became of those that nothing replaces.
RENAMED = {"embedded_guidance": "distilled_guidance"}
GONE = {"hedge_s": "requests to a reward service are sent once, and on_failure says how often they are tried again"}
# A misspelt key often brings a "missing" with it, so unknown keys come first.
ORDER = ("extra_forbidden", "union_tag_invalid", "union_tag_not_found", "missing")


def explain(error: ValidationError, source: str, overridden: set[str], root: type[BaseModel] = RunConfig) -> list[str]:
    """Return one sentence for each mistake in a `root`, the most useful first.

    `overridden` are the dotted paths that came from --set.
    """
    errors = sorted(error.errors(), key=lambda e: ORDER.index(e["type"]) if e["type"] in ORDER else len(ORDER))
    lines, meant, last = [], set(), None
    for item in errors:
        if any(other["loc"][:-1] == item["loc"] for other in errors):
            continue  # a list without its wrong entries is also too short: the entries say it better
        path, owner, annotation = locate(item["loc"], root)
        dotted = " ".join(".".join(path).split())  # a key may hold line breaks
        where = "--set" if ".".join(path) in overridden else source
        if item["type"] == "extra_forbidden":
            near = nearest_setting(path, owner, root)
            meant.add(near)
            if path[-1] in RENAMED:
                hint = f"it is called {'.'.join([*path[:-1], RENAMED[path[-1]]])} now"
            elif path[-1] in GONE:
                hint = f"it is gone: {GONE[path[-1]]}; leave it out"
            elif near:
                hint = f"did you mean {near}?"
            else:
                hint = f"{'.'.join(path[:-1]) or root.what} has {', '.join(owner.model_fields)}"
            lines.append(f"{where}: {dotted} is no setting; {hint}")
        elif item["type"] == "missing":
            if dotted not in meant:
                hint = "the list is too short" if path[-1].isdigit() else example(dotted, annotation, root)
                lines.append(f"{where}: {dotted} is missing; {hint}")
        elif item["type"] in ("union_tag_invalid", "union_tag_not_found") and isinstance(item["input"], dict):
            lines.append(f"{where}: {wrong_kind(dotted, annotation, item['input'].get('kind'))}")
        elif item["type"] in ("model_type", "model_attributes_type", "union_tag_not_found"):
            lines.append(f"{where}: {no_mapping(dotted, annotation, item['input'])}")
        elif item["loc"][-1] == "[key]":
            lines.append(f"{where}: {dotted} is no setting; {allowed(item)}")
        elif dotted == last:  # the next alternative of a setting that may hold several things
            lines[-1] += f", or {allowed(item).removeprefix('it must be ')}"
        else:
            lines.append(f"{where}: {dotted} is {short(item['input'])}; {allowed(item)}")
        last = dotted
    return lines


def locate(loc: Sequence[str | int], root: type[BaseModel]) -> tuple[list[str], type[BaseModel], Any]:
    """Return what an error's `loc` points at: the path, the model that holds its last key, and the annotation there.

    pydantic puts the kind of a discriminated block into `loc` too, and which alternative of a setting it tried; users
    never wrote these as keys, so they are left out.
    """
    path: list[str] = []
    owner, annotation = root, root
    for part in loc:
        if part == "[key]":
            continue
        models = list(sections(annotation))
        if len(models) > 1:
            annotation = next(model for model in models if kind_of(model) == part)
            continue
        if not models and is_union(annotation):
            continue
        path.append(str(part))
        if models:
            owner = models[0]
            annotation = owner.model_fields[part].annotation if part in owner.model_fields else None
        else:
            inner = get_args(annotation)
            annotation = inner[-1] if inner else None
    return path, owner, annotation


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the settings models among the alternatives of an annotation."""
    if hasattr(annotation, "models"):  # of `one_of`
        yield from annotation.models()
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from sections(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for alternative in get_args(annotation):
            yield from sections(alternative)


def is_union(annotation: Any) -> bool:
    """Return whether an annotation has several alternatives besides null."""
    alternatives = set(get_args(annotation)) - {type(None)}
    return get_origin(annotation) in (Union, types.UnionType) and len(alternatives) > 1


def nearest_setting(path: list[str], owner: type[BaseModel], root: type[BaseModel]) -> str | None:
    """Return the valid path that an unknown one most likely stands for: in the same block, else by name anywhere."""
    near = difflib.get_close_matches(path[-1], owner.model_fields, n=1)
    if near:
        return ".".join([*path[:-1], near[0]])
    return next((other for other in settings(root) if other.split(".")[-1] == path[-1]), None)


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted paths of all settings that a model always has, outer ones first."""
    yield from (prefix + name for name in model.model_fields)
    for name, field in model.model_fields.items():
        models = list(sections(field.annotation))
        if len(models) == 1 and type(None) not in get_args(field.annotation):
            yield from settings(models[0], f"{prefix}{name}.")


def example(path: str, annotation: Any, root: type[BaseModel]) -> str:
    """Say how a missing setting is added."""
    models = list(sections(annotation))
    if len(models) > 1:
        return f"add {path}.kind, one of {', '.join(map(kind_of, models))}"
    if models or get_origin(annotation) is dict:
        return f"add the block {path}, as in {root.sample}"
    plain = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return f"add {path}: {'a whole number' if plain is int else 'text'}"


def wrong_kind(path: str, annotation: Any, kind: Any) -> str:
    """Say which kinds a block can have."""
    kinds = [kind_of(model) for model in sections(annotation)]
    near = difflib.get_close_matches(str(kind), kinds, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    found = "is missing" if kind is None else f"is {short(kind)}"
    return f"{path}.kind {found}; it must be one of {', '.join(kinds)}{hint}"


def no_mapping(path: str, annotation: Any, value: Any) -> str:
    """Say how a block is written whose value is no mapping."""
    models = list(sections(annotation))
    kinds = [kind_of(model) for model in models if "kind" in model.model_fields]
    if value in kinds:
        return f"{path} is {short(value)}; write it as {path}.kind: {value}"
    keys = "kind" if kinds else next(iter(models[0].model_fields))
    if path.split(".")[-1] == "token":
        return f"{path} must not stand in a file; say where it is: {path}.env (a variable) or {path}.file (a path)"
    return f"{path} is {short(value)}; it must be a mapping of settings such as {path}.{keys}"


def allowed(item: dict[str, Any]) -> str:
    """Say what the value of a setting must be."""
    text = ALLOWED.get(item["type"])
    if text is None:
        return f"{item['msg'][0].lower()}{item['msg'][1:]}"
    near = ""
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        choices = [choice.strip(" '") for choice in item["ctx"]["expected"].replace(" or ", ", ").split(",")]
        close = difflib.get_close_matches(item["input"], choices, n=1)
        near = f" (did you mean {close[0]}?)" if close else ""
    bounds = {name: f"{value:g}" if isinstance(value, float) else value for name, value in item.get("ctx", {}).items()}
    return f"it must be {text.format(**bounds)}{near}"


def short(value: Any, length: int = 60) -> str:
    """Return a value as it stands in YAML, in at most `length` characters and without passwords."""
    text = masked(" ".join(YAML_WORDS.get(repr(value), repr(value)).split()))
    return text if len(text) <= length else text[: length - 3] + "..."
