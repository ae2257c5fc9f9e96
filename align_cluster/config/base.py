"""Base class of every settings block."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen settings that refuse unknown keys and undefined numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Root(Section):
    """All settings of a file: what errors call it, and a file to start from."""

    what: ClassVar[str]
    sample: ClassVar[str]
