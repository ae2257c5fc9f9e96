"""The settings reference, made from the models: every setting with its type, default, bounds and meaning.

The meaning is the string that stands below a setting in its class. It is read from the source only when somebody asks.
"""

import ast
import difflib
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, get_args

from pydantic.json_schema import GenerateJsonSchema

from align_cluster.errors import UserError
from align_cluster.kinds import kind_of
from align_cluster.settings import Root, Section

PLAIN = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "minItems": "entries >=",
    "maxItems": "entries <=",
    "multipleOf": "multiple of",
    "pattern": "like",
}


@dataclass(frozen=True)
class Setting:
    """Describes one setting as users write it; `default` is None where it has none, and must be given."""

    name: str
    type: str
    default: str | None
    meaning: str


@lru_cache
def meanings(section: type[Section]) -> Mapping[str, str]:
    """Return what stands below each setting in the source of its class, and of the classes that it builds on."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if not (issubclass(cls, Section) and cls is not Section):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for line, after in zip(body, body[1:], strict=False):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(text, str):
                found[line.target.id] = inspect.cleandoc(text)
    return found


def settings(section: type[Section]) -> list[Setting]:
    """Return the settings of one block in the order of its class."""
    schema, texts, rows = section.model_json_schema(), meanings(section), []
    for name, field in section.model_fields.items():
        if field.is_required():
            default = None
        elif isinstance(value := field.get_default(call_default_factory=True), Section):
            default = "its defaults" if not hasattr(value, "kind") else value.kind
        else:
            default = json.dumps(value, default=str)
        key = field.alias or name  # as users write it
        rows.append(Setting(key, _type(schema["properties"][key]), default, texts.get(name, "")))
    return rows


def _type(schema: dict[str, Any]) -> str:
    """Return a JSON schema of one setting in words."""
    if "$ref" in schema or "discriminator" in schema or "oneOf" in schema:
        return "block"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " | ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        inner = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        return f"list of {_type(inner)}" if inner else "list"
    if schema.get("type") == "object":
        return "blocks by name" if "$ref" in str(schema) or "oneOf" in str(schema) else "mapping"
    bounds = [f"{sign} {schema[key]}" for key, sign in BOUNDS.items() if key in schema]
    return " ".join([PLAIN.get(schema.get("type", ""), "anything"), *bounds])


class _Schema(GenerateJsonSchema):
    """Adds the meaning of every setting to a JSON schema."""

    def model_schema(self, schema: Any) -> dict[str, Any]:
        made = super().model_schema(schema)
        for name, text in meanings(schema["cls"]).items():
            made["properties"][name]["description"] = text
        return made


def json_schema(root: type[Root]) -> dict[str, Any]:
    """Return the JSON schema of a file for editors, with the meaning of every setting."""
    return root.model_json_schema(schema_generator=_Schema)


def topics(root: type[Root]) -> dict[str, type[Section]]:
    """Return every block of a file by its path, such as rollout or rewards.hps; that of the file is empty."""
    found: dict[str, type[Section]] = {"": root}
    _collect(root, "", found)
    return found


def _collect(section: type[Section], where: str, found: dict[str, type[Section]]) -> None:
    for name, field in section.model_fields.items():
        for block in _blocks(field.annotation):
            path = f"{where}{name}" + (f".{kind_of(block)}" if "kind" in block.model_fields else "")
            if path not in found:
                found[path] = block
                _collect(block, f"{path}.", found)


def _blocks(annotation: Any) -> Iterator[type[Section]]:
    """Yield the blocks that a setting's annotation allows."""
    if hasattr(annotation, "models"):  # made by `one_of`
        yield from annotation.models()
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _blocks(inner)


def explain(topic: str, root: type[Root], more: Mapping[str, type[Section]] = MappingProxyType({})) -> str:
    """Return a block's settings as text, with the blocks below it; the empty topic is the whole file.

    `more` has blocks that stand elsewhere than in the file. A topic may also stand before kinds, such as algorithm, and
    then all of them are listed. Raises UserError where there is no such block, with the nearest ones.
    """
    known = topics(root) | more
    below = [path for path in known if path and path != topic and (not topic or path.startswith(f"{topic}."))]
    if topic not in known and not below:
        near = difflib.get_close_matches(topic, known, 3, 0.5) or [path for path in known if topic in path][:5]
        hint = f"did you mean {' or '.join(near)}?" if near else "`align-cluster explain` lists all"
        raise UserError(f"explain: there is no block of settings {topic!r}; {hint}")
    lines = list(_described(known[topic])) if topic in known else []
    near = [path for path in below if _owner(path, known) == topic or topic not in known]
    if near:
        lines += ["", "more by `align-cluster explain ...`:", *(f"    {path}" for path in near)]
    return "\n".join(lines).strip()


def _owner(path: str, known: Mapping[str, type[Section]]) -> str:
    """Return the path of the block that a block stands in."""
    pieces = path.split(".")
    return next(outer for end in range(len(pieces) - 1, -1, -1) if (outer := ".".join(pieces[:end])) in known)


def _described(block: type[Section]) -> Iterator[str]:
    yield from (inspect.cleandoc(block.__doc__ or ""), "")
    for row in settings(block):
        given = "must be given" if row.default is None else f"default {row.default}"
        yield f"{row.name}  ({row.type}; {given})"
        yield from (f"    {line}" for line in row.meaning.splitlines())


def kinds(classes: Mapping[str, type]) -> str:
    """Return a line for each kind of a folder's dict: its name, and the first sentence about it."""
    first = {kind: inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0] for kind, cls in classes.items()}
    return columns({kind: " ".join(text.split()) for kind, text in first.items()})


def columns(rows: Mapping[str, str]) -> str:
    """Return a line for each name and what is said about it."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())
