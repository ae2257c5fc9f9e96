"""What a tracker is: a place besides the run's folder that a run's numbers go to, such as a server for many runs."""

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from align_cluster.files import read_json, write_json
from align_cluster.observe.rundir import RunDir
from align_cluster.settings import Root, Section

Values = dict[str, float]
Gauge = Callable[[float, dict[str, str]], None]  # takes a value and its labels


@dataclass(frozen=True)
class TrackedRun:
    """Says what a tracker must know of a run.

    path       the run's folder, whose name is the run's
    settings   every setting by its dotted path: numbers, truths and text
    rewards    the names of the run's rewards
    gauge      makes a gauge of a name, a meaning and names of labels, which Prometheus can read where the run works
    addresses  tells where Prometheus reads such gauges, as host:port
    """

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    rewards: tuple[str, ...] = ()
    gauge: Callable[[str, str, tuple[str, ...]], Gauge] | None = None
    addresses: Callable[[], list[str]] = list

    def folder(self, kind: str) -> Path:
        """Return the folder inside of the run's that a tracker keeps its files in."""
        return RunDir(self.path).trackers / kind

    def known(self, kind: str) -> str | None:
        """Return what the tracker calls this run, or None where it has not met it."""
        found = read_json(self.folder(kind) / "run.json")
        return found["id"] if found else None

    def remember(self, kind: str, name: str) -> None:
        """Keep what the tracker calls this run, so that the run goes on there when it is resumed."""
        write_json(self.folder(kind) / "run.json", {"id": name})


class TrackerSection(Section):
    """Configures a tracker. `package` is what it needs, which the extra of the same name installs."""

    package: ClassVar[str] = ""

    def problems(self, where: str, run: Root) -> Iterator[str]:
        """Refuse a tracker whose package is not installed."""
        if self.package and importlib.util.find_spec(self.package) is None:
            yield (
                f"{where}.kind is {self.kind}, and the package {self.package} is not installed here: "
                f"pip install 'align-cluster[{self.package}]', or leave this tracker out"
            )


class Tracker(ABC):
    """Takes the numbers of one run. All calls come from one thread of its own, which may wait as long as it likes.

    What it raises is told once and ends nothing. `live` trackers also get what the run does between two steps, every
    few seconds.
    """

    Config: ClassVar[type[TrackerSection]]
    live: ClassVar[bool] = False

    def __init__(self, config: TrackerSection) -> None:
        self.config = config

    @abstractmethod
    def open(self, run: TrackedRun) -> bool:
        """Get ready, and return whether the earlier steps of a resumed run are wanted: none of them is there yet."""

    @abstractmethod
    def write(self, step: int, values: Values) -> None:
        """Take some numbers of a step under the names that `observe.metrics` declares. Each is finite, or NaN."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Take note that the run has ended, by an error or an interruption if it `failed`."""


def finite(values: Values) -> Values:
    """Return the values without those that are NaN or infinite, which most trackers cannot draw."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
