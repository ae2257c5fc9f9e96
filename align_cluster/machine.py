"""What this process may use of its machine: the cores of its affinity and control groups, and the memory of those."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def cores(root: Path = ROOT) -> int:
    """Return the number of CPU cores that this process may use, at least 1.

    It is the number of cores that its affinity allows (`taskset`, Slurm), or less where a control group has a smaller
    quota (containers, `systemd-run`). Files of the control groups are read below `root`.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([allowed, *_quotas(root)])))


def memory(root: Path = ROOT) -> int:
    """Return the bytes of memory that this process may use: those of the machine, or of its smallest control group."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # of version 2 and of version 1
            limit = _words(folder / name)
            limits += [int(limit[0])] if limit and limit[0].isdigit() else []
    return min(limits)


def _quotas(root: Path) -> Iterator[float]:
    """Yield the cores that each control group of this process has time for, where it has a limit."""
    for folder in _groups(root, "cpu"):
        limit = _words(folder / "cpu.max")  # version 2: quota and period, in microseconds
        if not limit:
            limit = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(limit) == 2 and limit[0].isdigit() and limit[1].isdigit() and int(limit[1]):
            yield int(limit[0]) / int(limit[1])


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups for `controller`, from its own up to the top one."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").split("\n")
    except OSError:  # no Linux
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = top / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder == top or top in folder.parents)


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []
