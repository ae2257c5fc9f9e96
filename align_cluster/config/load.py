"""Run files: YAML and dotted overrides in, a checked RunConfig out; and back again.

Every mistake becomes one line that names the file or override, the dotted path, and what to write instead.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import ValidationError

from align_cluster.config.messages import explain, short
from align_cluster.config.run import RunConfig
from align_cluster.config.shipped import find, nearest
from align_cluster.errors import UserError
from align_cluster.files import read_text
from align_cluster.plain import MAX_CHARACTERS, MAX_DEPTH, yaml_value
from align_cluster.settings import Root

Settings = TypeVar("Settings", bound=Root)
_NO_RESULT_DEPENDS_ON = ("name", "out", "cluster", "checkpoint", "track")
# What may change where a run is resumed, besides: how long it goes on, what is looked at, and how the learner works.
_MAY_CHANGE = (
    *_NO_RESULT_DEPENDS_ON,
    *("steps", "guard", "evaluate.every", "evaluate.grid_every", "evaluate.grid_prompts", "evaluate.grid_columns"),
    *("learner.zero_stage", "learner.gradient_checkpointing"),
)

# Settings that a run fills in where they are left open; a resumed run takes them over.
_CHOSEN = ("rollout.chunk", "rollout.merge_lora", "learner.micro_batch", "learner.fold", "loop.ahead")


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or of `plain.yaml_value` would take for a number."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(path: str | Path, overrides: Sequence[str] = (), model: type[Settings] = RunConfig) -> Settings:
    """Read a file of settings and apply `a.b=value` overrides, whose values are YAML.

    Where there is no file `path`, the shipped one of that name is read. UserError lists every mistake, one a line.
    """
    file = find(path)
    try:
        text = read_text(file, MAX_CHARACTERS)
    except FileNotFoundError:
        near = nearest(file)
        hint = f"did you mean {near}?" if near else f"give the path of a file such as {model.sample}"
        raise UserError(f"{path} does not exist; {hint}") from None
    return loads(text, str(path), overrides, model)


def is_rather(path: str | Path, other: type[Root], than: type[Root]) -> bool:
    """Return whether a file has settings of the file `other`, and not of `than`, by the names in its first level."""
    try:
        names = set(yaml_value(read_text(find(path), MAX_CHARACTERS), str(path)) or ())
    except (UserError, FileNotFoundError, TypeError):
        return False
    strange, own = len(names - set(other.model_fields)), len(names - set(than.model_fields))
    complete = all(name in names for name, field in other.model_fields.items() if field.is_required())
    return strange < own or (strange == own == 0 and complete)


def loads(
    text: str, source: str = "config", overrides: Sequence[str] = (), model: type[Settings] = RunConfig
) -> Settings:
    """Read settings from text, as `load` does; messages call it `source`."""
    data = yaml_value(text, source)
    if data is None:
        raise UserError(f"{source} is empty; start from {model.sample}")
    if not isinstance(data, dict):
        raise UserError(f"{source} holds a {type(data).__name__}; it must be a mapping of settings such as steps: 60")
    changed = apply(data, overrides, model)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, source, changed, model))) from None


def apply(data: dict[str, Any], overrides: Sequence[str], model: type[Root] = RunConfig) -> set[str]:
    """Set dotted paths of `data` in place, one after the other, and return the paths.

    An override of `x.kind` to another kind than the file's starts block x anew, since one kind's settings mean nothing
    to another; overrides of x then fill it, also those given before. Null removes an entry that has a name of the
    user's, such as rewards.geneval.
    """
    pairs = _kinds_first([_split(override) for override in overrides])
    for path, value in pairs:
        block = data
        for depth, part in enumerate(path[:-1]):
            if block.get(part) is None:
                block[part] = {}
            if not isinstance(block[part], dict):
                there, here = (" ".join(".".join(names).split()) for names in (path, path[: depth + 1]))
                raise UserError(
                    f"--set {there}: {here} is {short(block[part])}, which has no settings; set {here} itself"
                )
            block = block[part]
        if path[-1] == "kind" and block.get("kind") != value:
            block.clear()
        if value is not None or not _is_named(path, model):
            block[path[-1]] = value
        elif block.pop(path[-1], None) is None:
            there = " ".join(".".join(path).split())
            raise UserError(
                f"--set {there}=null: there is none to remove; {path[0]} has {', '.join(map(str, block)) or 'none'}"
            )
    return {".".join(path) for path, _ in pairs}


def _kinds_first(pairs: list[tuple[list[str], Any]]) -> list[tuple[list[str], Any]]:
    """Return overrides in their order, but each kind before the settings of its block that were given before it."""
    ordered: list[tuple[list[str], Any]] = []
    for path, value in pairs:
        place = len(ordered)
        if path[-1] == "kind":
            # What sets the block as a whole, or the kind itself, stays before it.
            whole = [index for index, (other, _) in enumerate(ordered) if other == path[: len(other)]]
            begin = whole[-1] + 1 if whole else 0
            inside = (index for index in range(begin, place) if ordered[index][0][: len(path) - 1] == path[:-1])
            place = next(inside, place)
        ordered.insert(place, (path, value))
    return ordered


def _is_named(path: list[str], model: type[Root]) -> bool:
    """Return whether a path is that of an entry of a mapping of blocks, whose names are the user's."""
    field = model.model_fields.get(path[0])
    return len(path) == 2 and field is not None and get_origin(field.annotation) is dict


def _split(override: str) -> tuple[list[str], Any]:
    key, equals, value = override.partition("=")
    path = key.strip().split(".")
    said = "--set " + " ".join(override.split())[:80]
    if not equals or not all(path) or len(path) > MAX_DEPTH:
        raise UserError(f"{said}: write it as path=value, such as --set optimizer.lr=1e-4")
    return path, yaml_value(value, said)


def dump(config: RunConfig) -> str:
    """Return the resolved config, defaults included, as YAML that `load` reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def config_hash(config: RunConfig) -> str:
    """Return 16 hex digits of every setting that the result depends on: not of names, folders and workers."""
    data = config.model_dump(mode="json")
    for key in _NO_RESULT_DEPENDS_ON:
        del data[key]
    for reward in data["rewards"].values():
        reward["pool"] = reward["pool"] and reward["pool"]["batch"]  # what is scored together may matter in a last bit
        del reward["on_failure"]["stop_after"]  # says when a run ends, and nothing of what it does until then
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: RunConfig) -> list[str]:
    """List the settings of a resumed run that had to stay as they were: "path: old there, new here" for each."""
    old = _in_step(old)
    with suppress(ValidationError):  # else of a version that had other settings: they differ
        old = RunConfig.model_validate(old).model_dump(mode="json")  # with the defaults of settings that are new
    found = []

    def compare(path: str, there: Any, here: Any) -> None:
        if path in _MAY_CHANGE or re.fullmatch(r"rewards\.[^.]+\.on_failure\.stop_after", path):
            return
        if re.fullmatch(r"rewards\.[^.]+\.pool", path):  # where and how many, but for what is scored together
            path, there, here = f"{path}.batch", (there or {}).get("batch"), (here or {}).get("batch")
        if isinstance(there, dict) and isinstance(here, dict):
            for key in dict.fromkeys([*there, *here]):
                compare(f"{path}.{key}".lstrip("."), there.get(key), here.get(key))
        elif there != here and not (path in _CHOSEN and here is None):
            found.append(f"{path}: {json.dumps(there)} there, {json.dumps(here)} here")

    compare("", old, new.model_dump(mode="json"))
    return found


def as_before(old: dict[str, Any], new: RunConfig) -> RunConfig:
    """Return the config of a resumed run with what the run had filled in when it began."""
    old = _in_step(old)
    for path in _CHOSEN:
        section, name = path.split(".")
        block, known = getattr(new, section), (old.get(section) or {}).get(name)
        if getattr(block, name) is None and known is not None:
            new = new.model_copy(update={section: block.model_copy(update={name: known})})
    return new


def _in_step(old: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an earlier run; where it was begun before there was `loop`, it drew nothing ahead."""
    return {"loop": {"ahead": 0}} | old
