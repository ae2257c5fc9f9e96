"""Text from outside as plain values: YAML and JSON whose size and depth are bounded before a value is made.

Whatever a text holds, it becomes a value, or an error of one sentence.
"""

import json
import math
import re
from typing import Any

import yaml
from pydantic_core import from_json

from align_cluster.errors import UserError

MAX_CHARACTERS = 2**18  # of YAML: a run file has a hundredth of that, and the reader takes seconds for a megabyte
MAX_DEPTH = 50  # nested lists and mappings: the readers recurse, and run files nest six deep
MAX_NODES = 20_000  # values of a YAML file with its aliases written out; ten lines of aliases can stand for billions
_DEEP = f"lists and mappings are nested more than {MAX_DEPTH} deep"
_TYPES = {f"tag:yaml.org,2002:{name}" for name in "null bool int float str seq map merge".split()}
_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
# YAML 1.1 also reads 1:30:00 as 5400, 010 as 8 and 1_0 as 10, but wants 1.0e-4 for 1e-4. Numbers are YAML 1.2's here.
_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9]*)\Z|0x[0-9a-fA-F]+\Z"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?\Z|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z"
    ),
}


class _Loader(yaml.SafeLoader):
    """Safe YAML of plain values, with bounds, numbers of YAML 1.2, and no key that is set twice."""

    yaml_constructors = {
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _TYPES
    }
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag in _TYPES and tag not in _NUMBERS]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0
        self.weights: dict[yaml.Node, int] = {}  # nodes inside each finished node, with itself

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Compose one value, and count what it stands for. Raises ComposerError past a bound."""
        event, before = self.peek_event(), self.nodes
        if self.depth == MAX_DEPTH:
            self._refuse(_DEEP, event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent) and node not in self.weights:
            self._refuse(f"the alias *{event.anchor} is inside of what it stands for", event)
        self.nodes += self.weights.get(node, 1)
        self.weights.setdefault(node, self.nodes - before)
        if self.nodes > MAX_NODES:
            self._refuse(f"there are more than {MAX_NODES} values, with aliases written out", event)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Compose a mapping. Raises ComposerError where a key is no text, or is there twice."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEYS:
                self._refuse("a setting's name must be text; put it in quotes", key)
            if key.value in seen:
                self._refuse(f"{key.value} is set twice", key)
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make one value. Raises ConstructorError where a text is none of the type that its tag names."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError):  # what `!!int abc` and `!!bool abc` raise
            kind = node.tag.rsplit(":", 1)[-1]
            self._refuse(f"{str(node.value)[:40]!r} cannot be read as {kind}", node)

    @staticmethod
    def _refuse(problem: str, where: yaml.Node | yaml.Event) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def yaml_value(text: str, where: str) -> Any:
    """Read one YAML document of plain values. Raises UserError, which names `where` and the line."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where} has {len(text)} characters, and {MAX_CHARACTERS} are the most; shorten it")
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        spot = f", line {mark.line + 1}" if mark else ""
        problem = " ".join((error.problem or error.context).split())
        raise UserError(f"{where}{spot}: {problem}; correct that line") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as an escape for a character past the last
        raise UserError(f"{where} is not YAML ({' '.join(str(error).split())}); write it as plain UTF-8 text") from None


def json_value(text: str | bytes) -> Any:
    """Return the value of JSON, which is UTF-8 where it comes as bytes.

    Raises ValueError for what is no JSON, and for what others read otherwise or not at all: a key that is blank or
    there twice, deep nesting, half of a surrogate pair, NaN, infinity, and whole numbers of more than 64 bits.
    """
    try:
        from_json(text, allow_inf_nan=False)
    except ValueError as error:
        deep = str(error).startswith("recursion limit")
        raise ValueError(_DEEP if deep else str(error).replace("at line 1 column", "at column")) from None
    value = json.loads(text, object_pairs_hook=_once, parse_int=_whole, parse_float=_finite)
    if _is_deep(value):
        raise ValueError(_DEEP)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        if not key.strip():
            raise ValueError("a key is blank")
        found[key] = value
    return found


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**63:
        raise ValueError(f"{digits[:20]}... is more than a whole number of 64 bits")
    return number


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def _is_deep(value: Any) -> bool:
    """Return whether lists and mappings are nested more than MAX_DEPTH deep, without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [part for part in level if isinstance(part, (dict, list))]
        level = [item for part in inner for item in (part.values() if isinstance(part, dict) else part)]
    return any(isinstance(part, (dict, list)) for part in level)
