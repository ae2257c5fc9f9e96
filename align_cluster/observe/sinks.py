"""Sinks take a run's numbers: metrics.jsonl and evaluations.jsonl for machines, TensorBoard events for people.

Trackers get the same numbers by their feeds. TensorBoard also gets the run's settings, as text and in its table of
hyperparameters, and its sample grids.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from align_cluster.files import STORAGE
from align_cluster.observe.metrics import describe
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.trackers import feed
from align_cluster.observe.trackers.base import Values, finite
from align_cluster.plain import yaml_value
from align_cluster.texts import lines


class MetricWriter:
    """Writes one run's numbers. Use it as a context manager, or call `close`.

    Every name must be declared (`observe.metrics.describe`). A number that is not finite is written as null and is left
    out of TensorBoard: JSON has no NaN, and a run that diverges must stay visible and must not die in its logger.

    Lines that the disk has no room for stay in memory and are tried again with the next ones.
    """

    def __init__(
        self,
        run_dir: Path | str,
        done: int | None = None,
        note: Callable[[str], None] = print,
        feeds: Sequence[feed.Feed] = (),
    ) -> None:
        """Open the files in `run_dir`; `note` is called once with a sentence when the disk is full.

        `feeds` are those of the run's trackers.

        `done` goes on after that many steps of a run that was interrupted, whose files hold no later rows: its seconds
        count on, and TensorBoard forgets what it has of later steps.
        """
        self.files, self.note, self.feeds = RunDir(run_dir), note, feeds
        self.files.path.mkdir(parents=True, exist_ok=True)
        rows = read_jsonl(self.files.metrics) if done else []
        self.first = {name: value for name, value in (rows or [{}])[0].items() if value is not None}
        self.start = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
        self.held: list[tuple[Path, dict[str, Any]]] = []
        fresh = done is None or not any(self.files.tensorboard.glob("events.*"))
        self.board = self._open_board(None if fresh else done + 1)
        if fresh:
            self._settings()
            self._replay(earlier(self.files) if done is not None else [])
            for step in self.files.grid_steps():
                if done is not None and step <= done:
                    self.grid(step)

    def _open_board(self, purge: int | None = None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.files.tensorboard), flush_secs=10, purge_step=purge)

    def _settings(self) -> None:
        """Show the settings of config.yaml, if the run has written it."""
        if not self.files.config.exists():
            return
        from torch.utils.tensorboard.summary import hparams

        text = self.files.config.read_text(encoding="utf-8")
        settings = dict(flat(yaml_value(text, str(self.files.config))))
        _, values, _ = hparams(settings, {})  # TensorBoard finds out itself which metrics and runs there are

        def add(board: Any) -> None:
            board.add_text("settings", f"```yaml\n{text}\n```", 0)
            board.file_writer.add_summary(values)

        self._show(add)

    def _replay(self, rows: Sequence[feed.Row]) -> None:
        for step, values in rows:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line {"step", "seconds" since the run began, name: number ...}, and the same to TensorBoard.

        ValueError for a name that nobody declared; then nothing of the step is written.
        """
        for name in values:
            describe(name)
        record = {"step": step, "seconds": round(time.monotonic() - self.start, 3)}
        values = {name: float(value) for name, value in values.items()}
        self._append(self.files.metrics, record | values)
        self._scalars(step, values)

    def evaluation(self, step: int, version: int, adapter: str, scores: dict[str, Any]) -> None:
        """Append one held-out evaluation; `scores` is what `observe.table.summarise` returns."""
        self._append(self.files.evaluations, {"step": step, "version": version, "adapter": adapter, **scores})
        self._scalars(step, held_out(scores))

    def live(self, step: int, values: Values) -> None:
        """Hand what the run does now to the trackers of live values."""
        for one in self.feeds:
            if one.tracker.live:
                one.put(step, values)

    def grid(self, step: int) -> None:
        """Show the sample grid of `step`, whose file is there."""
        with Image.open(self.files.grid(step)) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._show(lambda board: board.add_image("grid", pixels, step, dataformats="HWC"))

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        told = bool(self.held)
        self.held.append((path, record))
        try:
            while self.held:
                append_jsonl(*self.held[0])
                del self.held[0]
        except OSError as error:
            if error.errno not in STORAGE:
                raise
            if not told:
                self.note(
                    f"{path} cannot be written ({error.strerror}); its lines are held in memory and written once there "
                    "is room: make some"
                )

    def _scalars(self, step: int, values: Values) -> None:
        def add(board: Any) -> None:
            for name, value in finite(values).items():
                board.add_scalar(name, value, step)

        self._show(add)
        for one in self.feeds:
            one.put(step, values)

    def _show(self, add: Callable[[Any], None]) -> None:
        try:
            self.board = self.board or self._open_board()
            add(self.board)
        except OSError:  # an earlier write failed: TensorBoard writes in a thread, which has ended with that error
            self.board = None

    def mark(self) -> Callable[[], dict[str, bytes]]:
        """Return a function that gives the files' content up to this moment, whenever it is called."""
        marks = {}
        for path in (self.files.metrics, self.files.evaluations):
            held = "".join(_line(record) for at, record in self.held if at == path)
            marks[path] = (path.stat().st_size if path.exists() else 0, held.encode())
        return lambda: {path.name: _start_of(path, size) + held for path, (size, held) in marks.items()}

    def close(self, failed: bool = False) -> None:
        """Write what TensorBoard and trackers still hold; what does not take it is noted, not raised.

        `failed` says that an error or an interruption ended the run.
        """
        try:
            if self.board:
                self.board.close()
        except OSError as error:
            self.note(f"{self.files.tensorboard} is not complete ({error.strerror}); metrics.jsonl is what counts")
        feed.close(self.feeds, failed)

    def __enter__(self) -> "MetricWriter":
        """Return the writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the writer."""
        self.close(kind is not None)


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append `record` as one line and hand it to the operating system at once. Numbers that are not finite become null.

    A torn last line, which a killed run leaves behind, is cut off first.
    """
    line = _line(record)
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read() if not _ends_clean(file) else b""
        if content:
            file.truncate(content.rfind(b"\n") + 1)
        file.write(line.encode())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file that may still grow, or whose writer was killed: a torn last line is left out.

    A missing file has no records. JSONDecodeError for any other line that is not JSON, since a killed writer does not
    explain it.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1].decode()
    return [json.loads(line) for _, line in lines(whole)]


def earlier(files: RunDir) -> list[feed.Row]:
    """Return the numbers of a run so far, as trackers get them: those of its steps and of its evaluations."""
    rows = [(row.pop("step"), row) for row in read_jsonl(files.metrics)]
    rows += [(record["step"], held_out(record)) for record in read_jsonl(files.evaluations)]
    known = [(step, {name: v for name, v in row.items() if name != "seconds" and v is not None}) for step, row in rows]
    return sorted(known, key=lambda row: row[0])


def held_out(scores: dict[str, Any]) -> Values:
    """Return the overall scores of an evaluation under the names that trackers give them."""
    return {f"held_out/{column}": value for column, value in scores["overall"].items()}


def flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting with its dotted path. Trackers take numbers, text and truth, so a list becomes text."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from flat(part, f"{where}.{name}".lstrip("."))
    elif value is not None:
        yield where, value if isinstance(value, (bool, int, float, str)) else json.dumps(value)


def _start_of(path: Path, size: int) -> bytes:
    """Return the whole lines among the first `size` bytes."""
    if not size:
        return b""
    with path.open("rb") as file:
        content = file.read(size)
    return content[: content.rfind(b"\n") + 1]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _ends_clean(file: Any) -> bool:
    """Return whether an open binary file is empty or ends with a newline, and leave its position at the start."""
    size = file.seek(0, 2)
    if size:
        file.seek(-1, 2)
    clean = size == 0 or file.read(1) == b"\n"
    file.seek(0)
    return clean


def _finite(value: Any) -> Any:
    """Replace every number that is not finite, at any depth, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
