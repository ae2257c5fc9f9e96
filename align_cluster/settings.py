"""The base classes of all settings."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from align_cluster.errors import UserError, unwritable
from align_cluster.files import user_path

PATHS = ("path", "folder", "file", "exclude", "out")  # settings that are paths in every block
GIB = 2**30  # bytes: what settings of memory are in
LARGEST = 2**63  # whole numbers end below it, because seeds and counts reach generators and arrays of 64 bits
# What names a folder, a metric or a part of an address: `..` and hidden names are none.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=100)]
Fraction = Annotated[float, Field(ge=0, le=1)]
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
_CREDENTIALS = re.compile(r"(?<=://)(?!git@)[^/\s@]+(?=@)")


@dataclass(frozen=True)
class ModelSource:
    """Says what a setting that names a model may hold besides null, so that a missing model is found before a run.

    give    how the sentence about a missing one ends
    holds   files that a folder must have, where braces stand for other settings of the block; None allows no folder
    file    whether it may be a single file
    ids     pattern of what is looked up elsewhere, such as a hub id: nobody asks there before a run begins
    words   what stands for a model of this package
    """

    give: str
    holds: tuple[str, ...] | None = ()
    file: bool = False
    ids: str = HUB_ID
    words: tuple[str, ...] = ()

    def problem(self, block: "Section", value: str) -> str | None:
        """Say why nothing can be loaded from the value, as the end of a sentence; None where something may be."""
        path, folders = user_path(value), self.holds is not None
        if path.is_dir() and folders and value not in self.words:
            wanted = [name.format(**vars(block)) for name in self.holds]
            lacks = next((name for name in wanted if not (path / name).is_file()), None)
            return f"a folder without {lacks}" if lacks else None
        elsewhere = value in self.words or re.fullmatch(self.ids, value)
        if self.file if path.is_file() else elsewhere:
            return None
        kinds = "file or folder" if self.file and folders else "folder" if folders else "file"
        return f"which is no {kinds} here" + (" and no hub id" if HUB_ID in self.ids else "")


class Section(BaseModel):
    """Holds settings that are frozen and refuse unknown keys, NaN, infinity, and true or false for a number.

    They also refuse an address with a user or password in it, because settings are written to a run's files, and text
    that no file can hold or no path can be.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    # Settings that name models, which results depend on. Each says what it may hold; None where a rule says that.
    reads: ClassVar[Mapping[str, ModelSource | None]] = {}

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

    def missing(self, where: str) -> Iterator[str]:
        """Yield a sentence for each setting of this block that names a model which is not there."""
        for name, source in self.reads.items():
            value = getattr(self, name)
            if source and value is not None and (problem := source.problem(self, value)):
                yield f"{where}.{name} is {value}, {problem}; give {source.give}"

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
        parts = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, (list, tuple)) else {}
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


def masked(text: str) -> str:
    """Return the text with *** in place of users and passwords in addresses."""
    return _CREDENTIALS.sub("***", text)
