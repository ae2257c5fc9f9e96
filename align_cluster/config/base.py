"""Base class of every settings block."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen settings that refuse unknown keys and undefined numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
