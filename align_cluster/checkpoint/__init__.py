"""Checkpoints: complete or absent, verified when read, and written while training continues."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveInt

from align_cluster.checkpoint.store import unusable
from align_cluster.settings import Root, Section


class CheckpointConfig(Section):
    """Configures when a run saves its state, and where.

    every       steps between checkpoints; 0 saves only when the run ends or is interrupted (SIGTERM, Ctrl-C, an error)
    keep        number of newest checkpoints to keep, besides the newest one in which no `guard` rule was broken
    keep_best   also keep the checkpoint with the best held-out headline score; a save then follows every evaluation
    inputs_may_change   go on, with a note, where prompts, images or models differ from those that the run began with
    path        any folder that fsspec knows, such as s3://bucket/runs, with a folder for each run; null is checkpoints/
                in the run directory. A run begins by writing, reading, renaming and deleting a few bytes there
    """

    every: Annotated[int, Field(ge=0)] = 10
    keep: PositiveInt = 2
    keep_best: bool = True
    inputs_may_change: bool = False
    path: str | None = None

    def problems(self, where: str, run: Root) -> Iterator[str]:
        """Refuse a path that names no place which outlives the run."""
        if self.path and (reason := unusable(self.path)):
            yield f"{where}.path is {self.path}, {reason}; give a folder, or an address such as s3://bucket/runs"
