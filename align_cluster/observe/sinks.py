"""Where numbers go: metrics.jsonl and evaluations.jsonl for machines, TensorBoard events for people."""

import json
import math
import time
from pathlib import Path
from typing import Any

from align_cluster.observe.metrics import describe
from align_cluster.observe.rundir import RunDir


class MetricWriter:
    """Writes one run's numbers. Use it as a context manager, or call `close`.

    Every name must be declared in `metrics.py`. A number that is not finite is written as null (JSON has no NaN; a
    diverged run must stay visible, and must not die in its logger) and is left out of TensorBoard.
    """

    def __init__(self, run_dir: Path | str):
        from torch.utils.tensorboard import SummaryWriter

        self.files = RunDir(run_dir)
        self.files.path.mkdir(parents=True, exist_ok=True)
        self.start = time.monotonic()
        self.board = SummaryWriter(str(self.files.tensorboard), flush_secs=10)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line {"step", "seconds" since the writer began, name: number ...} and the same to TensorBoard."""
        for name in values:
            describe(name)
        record = {"step": step, "seconds": round(time.monotonic() - self.start, 3)}
        append_jsonl(self.files.metrics, record | {name: float(value) for name, value in values.items()})
        for name, value in values.items():
            if math.isfinite(value):
                self.board.add_scalar(name, value, step)

    def evaluation(self, step: int, version: int, adapter: str, scores: dict[str, Any]) -> None:
        """Append one held-out evaluation: `scores` is what `evaluate.table.summarise` returns."""
        append_jsonl(self.files.evaluations, {"step": step, "version": version, "adapter": adapter, **scores})
        for column, value in scores["overall"].items():
            self.board.add_scalar(f"held_out/{column}", value, step)

    def close(self) -> None:
        self.board.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append `record` as one line and hand it to the system at once; numbers that are not finite become null.

    A torn last line, which a killed run leaves behind, is cut off first.
    """
    line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read() if not _ends_clean(file) else b""
        if content:
            file.truncate(content.rfind(b"\n") + 1)
        file.write(line.encode())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a file that may still be growing, or whose writer was killed: a torn last line is left out.

    A missing file has no records. A line before the last that is not JSON raises: that file was damaged otherwise.
    """
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines if line.strip()]


def _ends_clean(file: Any) -> bool:
    """Whether an open binary file is empty or ends with a newline; leaves the position at the start."""
    size = file.seek(0, 2)
    if size:
        file.seek(-1, 2)
    clean = size == 0 or file.read(1) == b"\n"
    file.seek(0)
    return clean


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
