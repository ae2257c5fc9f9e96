"""Base class of every settings block."""

import re
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
_CREDENTIALS = re.compile(r"(?<=://)(?!git@)[^/\s@]+(?=@)")


class Section(BaseModel):
    """Frozen settings that refuse unknown keys, undefined numbers, and passwords, which would go into a run's files."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def holds_no_password(cls, value: Any) -> Any:
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and _CREDENTIALS.search(text):
                raise ValueError("without a user or password in the address: put them into ~/.netrc or a variable")
        return value


class Root(Section):
    """All settings of a file: what errors call it, and a file to start from."""

    what: ClassVar[str]
    sample: ClassVar[str]


def masked(text: str) -> str:
    """The text with *** in the place of users and passwords of addresses."""
    return _CREDENTIALS.sub("***", text)
