"""The base classes of all settings."""

import re
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
_CREDENTIALS = re.compile(r"(?<=://)(?!git@)[^/\s@]+(?=@)")


class Section(BaseModel):
    """Holds settings that are frozen and refuse unknown keys, NaN and infinity.

    They also refuse an address with a user or password in it, because settings are written to a run's files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def holds_no_password(cls, value: Any) -> Any:
        """Refuse a string, or a list entry, that has credentials in an address."""
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and _CREDENTIALS.search(text):
                raise ValueError("without a user or password in the address: put them into ~/.netrc or a variable")
        return value


class Root(Section):
    """Holds the settings of a whole file.

    `what` is the file's name in error messages, and `sample` is a file that a user can start from.
    """

    what: ClassVar[str]
    sample: ClassVar[str]


def masked(text: str) -> str:
    """Return the text with *** in place of users and passwords in addresses."""
    return _CREDENTIALS.sub("***", text)
