"""The base classes of all settings."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator
from pydantic_core import core_schema

GIB = 2**30  # bytes: what settings of memory are in
Fraction = Annotated[float, Field(ge=0, le=1)]
_CREDENTIALS = re.compile(r"(?<=://)(?!git@)[^/\s@]+(?=@)")


class Section(BaseModel):
    """Holds settings that are frozen and refuse unknown keys, NaN and infinity.

    They also refuse an address with a user or password in it, because settings are written to a run's files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    reads: ClassVar[tuple[str, ...]] = ()  # settings that name models: files or folders that results depend on

    @field_validator("*")
    @classmethod
    def holds_no_password(cls, value: Any) -> Any:
        """Refuse a string, or a list entry, that has credentials in an address."""
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and _CREDENTIALS.search(text):
                raise ValueError("without a user or password in the address: put them into ~/.netrc or a variable")
        return value

    def problems(self, where: str, run: "Root") -> Iterator[str]:
        """Yield a sentence for each thing about this block that cannot work in `run`; `where` is the block's path.

        A sentence names the setting's path, says what is wrong, and gives the nearest valid choice.
        """
        yield from ()

    def notes(self, where: str, run: "Root") -> Iterator[str]:
        """Yield a sentence for each thing that is allowed but probably not meant."""
        yield from ()


class Root(Section):
    """Holds the settings of a whole file.

    `what` is the file's name in error messages, and `sample` is a file that a user can start from.
    """

    what: ClassVar[str]
    sample: ClassVar[str]

    def blocks(self) -> Iterator[tuple[str, Section]]:
        """Yield every block of settings inside the file with its dotted path, outer ones first."""
        yield from _inside(self, "")


def _inside(value: Any, where: str) -> Iterator[tuple[str, Section]]:
    if isinstance(value, Section):
        if where:
            yield where, value
        parts = {name: getattr(value, name) for name in type(value).model_fields}
    else:
        parts = value if isinstance(value, dict) else {}
    for name, part in parts.items():
        yield from _inside(part, f"{where}.{name}".lstrip("."))


def one_of(kinds: Mapping[str, type], when: Callable[[type], bool] = lambda kind: True) -> type:
    """Make the settings type of a folder's classes, told apart by `kind`; `when` leaves some of them out.

    The dict is read whenever settings are checked, so a class that is put into it later is a choice from then on.
    """

    class OneOf:
        @classmethod
        def models(cls) -> tuple[type[Section], ...]:
            return tuple(kind.Config for kind in kinds.values() if when(kind))

        @classmethod
        def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
            return core_schema.no_info_plain_validator_function(
                lambda value: _choice(cls.models()).validate_python(value)
            )

        @classmethod
        def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
            return handler(_choice(cls.models()).core_schema)

    return OneOf


@lru_cache
def _choice(models: tuple[type[Section], ...]) -> TypeAdapter:
    union = Union[models]  # noqa: UP007 - made of a tuple
    return TypeAdapter(union if len(models) == 1 else Annotated[union, Field(discriminator="kind")])


def masked(text: str) -> str:
    """Return the text with *** in place of users and passwords in addresses."""
    return _CREDENTIALS.sub("***", text)
