"""The base classes of all settings."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError, core_schema

from align_cluster.errors import UserError, unwritable
from align_cluster.files import user_path

PATHS = ("path", "folder", "file", "exclude", "out")  # settings that are paths in every block
GIB = 2**30  # bytes: what settings of memory are in
LARGEST = 2**63  # whole numbers end below it, because seeds and counts reach generators and arrays of 64 bits
# What names a folder, a metric or a part of an address: `..` and hidden names are none.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=100)]
Fraction = Annotated[float, Field(ge=0, le=1)]
_CREDENTIALS = re.compile(r"(?<=://)(?!git@)[^/\s@]+(?=@)")


class Section(BaseModel):
    """Holds settings that are frozen and refuse unknown keys, NaN, infinity, and true or false for a number.

    They also refuse an address with a user or password in it, because settings are written to a run's files, and text
    that no file can hold or no path can be.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    reads: ClassVar[tuple[str, ...]] = ()  # settings that name models: files or folders that results depend on

    @model_validator(mode="before")
    @classmethod
    def takes_no_truth_for_a_number(cls, data: Any) -> Any:
        """Make text of true and false where pydantic would take them for 1 and 0; as text they are refused."""
        if not isinstance(data, dict):
            return data
        return {key: _as_text(value) if _wants_numbers(cls, key) else value for key, value in data.items()}

    @field_validator("*")
    @classmethod
    def is_no_huge_number(cls, value: Any) -> Any:
        """Refuse whole numbers of more than 63 bits."""
        if any(isinstance(part, int) and abs(part) >= LARGEST for part in _parts(value)):
            raise PydanticCustomError("less_than", "Input should be less than {lt}", {"lt": LARGEST})
        return value

    @field_validator("*")
    @classmethod
    def is_text_to_write_down(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a string, or a list entry, with credentials in an address, or that no file can hold; and a path that
        no file can have."""
        for text in _parts(value):
            if not isinstance(text, str):
                continue
            if _CREDENTIALS.search(text):
                raise ValueError("without a user or password in the address: put them into ~/.netrc or a variable")
            if unwritable(text):
                raise ValueError(f"something else ({text[:60]!r} holds a character that no file can have)")
            if info.field_name in (*PATHS, *cls.reads) and "://" not in text:
                try:
                    user_path(text)
                except UserError as error:
                    raise ValueError(f"something else ({error})") from None
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


def _parts(value: Any) -> Iterator[Any]:
    """Yield a value and what a list or mapping holds."""
    yield value
    yield from value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()


def _as_text(value: Any) -> Any:
    """Return a value with true and false, also as entries of a list or mapping, as text."""
    if isinstance(value, dict):
        return {key: _word(part) for key, part in value.items()}
    return [_word(part) for part in value] if isinstance(value, (list, tuple)) else _word(value)


def _word(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


@cache
def _wants_numbers(model: type[BaseModel], key: str) -> bool:
    """Return whether a setting holds numbers, and no truth."""
    field = model.model_fields.get(key)
    wanted = set(_leaves(field.annotation)) if field else set()
    return bool(wanted & {int, float}) and bool not in wanted


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation is made of; of a literal, those of its choices."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        yield from map(type, inner)
    elif get_origin(annotation) is Annotated:
        yield from _leaves(inner[0])
    elif inner:
        for part in inner:
            yield from _leaves(part)
    else:
        yield annotation


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
