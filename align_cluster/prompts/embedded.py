"""Prompts of the embedded world: shapes, colours, counts, positions, and short words."""

from itertools import cycle, islice
from typing import Annotated, Literal

from pydantic import Field, field_validator

from align_cluster.embedded import scene
from align_cluster.prompts.base import PromptSource
from align_cluster.settings import Section
from align_cluster.types import Prompt


class EmbeddedPrompts(PromptSource):
    """Lists the prompts of the embedded world for the chosen tasks and split.

    With `even`, every task has the same number of prompts: prompts of smaller tasks repeat (1,167 training prompts name
    a colour, 102 a count). Without it, every prompt comes once.
    """

    class Config(Section):
        """Configures the embedded prompts. Training and held-out prompts never overlap."""

        kind: Literal["embedded"] = "embedded"
        tasks: Annotated[tuple[Literal[scene.TASKS], ...], Field(min_length=1)] = (
            "single_object",
            "colors",
            "counting",
        )
        """The tasks whose prompts are listed, each once. Rewards judge only some: geneval needs objects and ocr needs
        the task ocr."""
        split: Literal["train", "held_out"] = "train"
        """Which part of each task is listed. Training and held-out prompts never overlap: train on `train`, and give
        `held_out` to evaluate.prompts."""
        even: bool = True
        """Whether every task has equally many prompts, so that prompts of smaller tasks repeat: 1,167 training prompts
        name a colour, 102 a count. false lists every prompt once."""

        @field_validator("tasks")
        @classmethod
        def name_each_task_once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
            """Refuse a list that names a task twice."""
            repeated = next((task for task in tasks if tasks.count(task) > 1), None)
            if repeated:
                raise ValueError(f"a list that names {repeated!r} once")
            return tasks

    def load(self) -> list[Prompt]:
        """Return the prompts, task by task, in a fixed order."""
        prompts: list[Prompt] = []
        known = 0
        pools = [scene.prompts(task, self.config.split) for task in self.config.tasks]
        turns = max(map(len, pools))
        for records in pools:
            pool = [Prompt(known + i, record["prompt"], dict(record)) for i, record in enumerate(records)]
            known += len(pool)
            prompts += islice(cycle(pool), turns) if self.config.even else pool
        return prompts
