"""Checkpoints: complete or absent, verified when read, and written while training continues."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveInt

from align_cluster.checkpoint.store import unusable
from align_cluster.settings import Root, Section


class CheckpointConfig(Section):
    """Configures when a run saves its state, and where."""

    every: Annotated[int, Field(ge=0)] = 10
    """The number of training steps between checkpoints. 0 saves only when the run ends or is interrupted: by SIGTERM,
    Ctrl-C or an error."""
    keep: PositiveInt = 2
    """The number of newest checkpoints that are kept. The newest one in which no rule of `guard` was broken is kept
    besides."""
    keep_best: bool = True
    """Whether the checkpoint with the best held-out score of the first trained reward is kept too. A checkpoint then
    follows every evaluation."""
    inputs_may_change: bool = False
    """Whether a resumed run goes on, with a note, where prompts, images or models differ from those that it began
    with. Otherwise it is refused by the names of what changed."""
    path: str | None = None
    """The folder for checkpoints, in which every run has a folder of its own name. It may be any that fsspec knows,
    such as s3://bucket/runs. Null takes checkpoints/ in the run directory. A run begins by writing, reading,
    renaming and deleting a few bytes there."""

    def problems(self, where: str, run: Root) -> Iterator[str]:
        """Refuse a path that names no place which outlives the run."""
        if self.path and (reason := unusable(self.path)):
            yield f"{where}.path is {self.path}, {reason}; give a folder, or an address such as s3://bucket/runs"
