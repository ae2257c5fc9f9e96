"""What a stage of gpu.py measures with: time, memory, and a row for each figure."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import add

from align_cluster.planner.fit import GIB
from align_cluster.planner.report import PEAKS


@dataclass(frozen=True)
class Bench:
    """Where a stage measures, and where its rows go.

    rows   file of this stage's rows, one JSON object a line
    done   names of rows that an earlier try has left
    plan   what the planner said, by case of gpu_plan.py
    """

    device: str
    tiny: bool
    rows: Path
    done: frozenset[str]
    plan: dict[str, Any]

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure one figure, unless it is there, and write it or its error down.

        A figure that fails, for lack of memory too, costs the stage no other one.
        """
        if name in self.done:
            return
        started = time.perf_counter()
        try:
            figures = measure()
        except Exception as error:
            figures = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        self.free()
        add(self.rows, {"name": name, **figures, "took_s": round(time.perf_counter() - started, 2)})

    def free(self) -> None:
        """Return what nothing refers to any more to the device."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def held(self) -> int:
        """Return the bytes of the device's tensors in use; 0 on a CPU, where nobody counts them."""
        self.free()
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def time(self, work: Callable[[], Any]) -> float:
        """Return the seconds of one call, until the device has finished it."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def seconds(self, work: Callable[[], Any], rounds: int = 3, enough: float = 1.5) -> float:
        """Return the median time of a call, over `rounds` calls or as many as begin within `enough` seconds."""
        times: list[float] = []
        while len(times) < rounds and sum(times) < enough:
            times.append(self.time(work))
        return statistics.median(times)

    def peak(self, since: int) -> Callable[[], dict[str, float]]:
        """Begin to watch memory; the returned function tells the most GiB at once beyond `since` bytes."""
        if self.device == "cpu":
            return dict
        torch.cuda.reset_peak_memory_stats()
        return lambda: {"gib": (torch.cuda.max_memory_allocated() - since) / GIB}

    def share(self, tflop: float, seconds: float) -> dict[str, float]:
        """Return which part of the card's bf16 peak so much work in so much time is."""
        name = torch.cuda.get_device_name() if self.device == "cuda" else ""
        peak = next((bf16 for part, (bf16, _) in PEAKS.items() if part in name), None)
        return {"of_peak": tflop / seconds / peak} if peak and tflop else {}
