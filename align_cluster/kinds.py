"""Tables of classes by kind, and the settings types that choose from them."""

import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Union

from pydantic import BaseModel, Discriminator, Field, Tag, TypeAdapter
from pydantic_core import core_schema

from align_cluster.errors import UserError
from align_cluster.settings import Section


class Kinds(dict[str, type]):
    """Holds a folder's classes by kind, and a user's own by import path, such as my_package.module:Class.

    A class of the user's is imported where it is first asked for, in any process, and is a choice like the others from
    then on. The `kind` of its Config is text.
    """

    def __missing__(self, kind: str) -> type:
        if not is_path(kind):
            raise KeyError(kind)
        self[kind] = _imported(kind)
        return self[kind]


def is_path(kind: Any) -> bool:
    """Return whether a kind is the import path of a class."""
    return isinstance(kind, str) and ":" in kind


def _imported(kind: str) -> type:
    """Return the class at an import path. Raises UserError where there is none that can be a kind."""
    module, _, name = kind.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name != module and not module.startswith(f"{error.name}."):
            raise UserError(f"kind {kind}: {module} imports {error.name}, which is not installed here") from error
        raise UserError(
            f"kind {kind}: there is no module {module}; run the command in the folder that has it, or add that folder "
            "to PYTHONPATH"
        ) from None
    except Exception as error:  # the module is the user's, so anything can come out of it
        raise UserError(f"kind {kind}: importing {module} fails ({type(error).__name__}: {error}); mend it") from error
    config = getattr(found, "Config", None)
    if not isinstance(found, type) or not isinstance(config, type) or not issubclass(config, Section):
        raise UserError(f"kind {kind}: {module} has no class {name} with a Config of settings; name one that has")
    if "kind" not in config.model_fields or config.model_fields["kind"].annotation is not str:
        raise UserError(f"kind {kind}: {name}.Config must have the setting `kind: str`, which holds this path; add it")
    if kind_of(config) != kind:
        raise UserError(f"kind {kind} is {kind_of(config)}; write it so")
    return found


def kind_of(config: type[BaseModel]) -> str:
    """Return the kind that a class of settings is for: its only value, or the import path of a user's class."""
    if config.model_fields["kind"].annotation is str:
        return f"{config.__module__}:{config.__qualname__.removesuffix('.Config')}"
    return config.model_fields["kind"].default


def one_of(kinds: Mapping[str, type], when: Callable[[type], bool] = lambda kind: True) -> type:
    """Make the settings type of a table's classes, told apart by `kind`; `when` leaves some of them out.

    The table is read whenever settings are checked, so a class that is put into it later is a choice from then on.
    """

    class OneOf:
        @classmethod
        def models(cls) -> tuple[type[Section], ...]:
            return tuple(kind.Config for kind in kinds.values() if when(kind))

        @classmethod
        def check(cls, value: Any) -> Section:
            if is_path(kind := _kind(value)):
                kinds[kind]  # imports it
            return _choice(cls.models()).validate_python(value)

        @classmethod
        def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
            return core_schema.no_info_plain_validator_function(cls.check)

        @classmethod
        def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
            return handler(_choice(cls.models()).core_schema)

    return OneOf


def _kind(value: Any) -> Any:
    return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)


@lru_cache
def _choice(models: tuple[type[Section], ...]) -> TypeAdapter:
    if len(models) == 1:
        return TypeAdapter(models[0])
    if all(model.model_fields["kind"].annotation is not str for model in models):
        return TypeAdapter(Annotated[Union[models], Field(discriminator="kind")])  # noqa: UP007 - made of a tuple
    tagged = tuple(Annotated[model, Tag(kind_of(model))] for model in models)
    return TypeAdapter(Annotated[Union[tagged], Discriminator(_kind)])  # noqa: UP007 - made of a tuple
