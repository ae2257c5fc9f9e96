"""The contract of a source of prompts."""

from abc import ABC, abstractmethod
from typing import ClassVar

from align_cluster.settings import Section
from align_cluster.types import Prompt


class PromptSource(ABC):
    """A source of prompts. The constructor is cheap; `load` reads or makes the prompts.

    `has_images` says that each prompt comes with a real image (metadata `image`), `has_records` that the source is a
    file of GenEval's records.
    """

    Config: type[Section]
    has_images: ClassVar[bool] = False
    has_records: ClassVar[bool] = False

    def __init__(self, config: Section) -> None:
        self.config = config

    @abstractmethod
    def load(self) -> list[Prompt]:
        """Return all prompts, always in the same order. Raises UserError where there are none."""
