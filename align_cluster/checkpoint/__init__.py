"""Checkpoints: complete or not there, checked when read, written while training goes on."""

from typing import Annotated

from pydantic import Field, PositiveInt

from align_cluster.settings import Section


class CheckpointConfig(Section):
    """When a run saves itself. `every: 0` saves only when it ends, or is told to end (SIGTERM, Ctrl-C, an error).

    The newest `keep` are kept, the newest one in which no rule of `guard` was broken, and with `keep_best` the one with
    the best held-out headline score, for which every evaluation is followed by a save. `path` is any folder that fsspec
    knows, such as s3://bucket/runs, in which each run has its own; null: checkpoints/ in the run directory.
    """

    every: Annotated[int, Field(ge=0)] = 10
    keep: PositiveInt = 2
    keep_best: bool = True
    path: str | None = None
