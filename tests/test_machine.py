"""Cores and memory that this process may use, read from control groups as Linux writes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from align_cluster.machine import cores, memory

ALLOWED = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
VERSION_2 = "0::/slice/job\n"
VERSION_1 = "4:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/job\n"


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A folder with the files of control groups."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_the_smallest_quota_of_all_control_groups_counts(tmp_path):
    cases = {
        "none": ("", {}, ALLOWED),
        "no limit": (VERSION_2, {"sys/fs/cgroup/slice/job/cpu.max": "max 100000"}, ALLOWED),
        "one core": (VERSION_2, {"sys/fs/cgroup/slice/job/cpu.max": "100000 100000"}, 1),
        "of a group above": (VERSION_2, {"sys/fs/cgroup/slice/cpu.max": "150000 100000"}, 1),
        "in a container": ("0::/\n", {"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        "less than one": (VERSION_2, {"sys/fs/cgroup/slice/job/cpu.max": "20000 100000"}, 1),
        "more than there are": (VERSION_2, {"sys/fs/cgroup/cpu.max": "99900000 100000"}, ALLOWED),
        "version 1": (
            VERSION_1,
            {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000"},
            1,
        ),
        "version 1 without a limit": (
            VERSION_1,
            {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000"},
            ALLOWED,
        ),
    }
    for name, (groups, files, expected) in cases.items():
        assert cores(machine(tmp_path / name, groups, files)) == expected, name


def test_memory_is_that_of_the_smallest_control_group(tmp_path):
    assert memory(machine(tmp_path / "2", VERSION_2, {"sys/fs/cgroup/slice/memory.max": "1000000\n"})) == 1_000_000
    one = {"sys/fs/cgroup/memory/job/memory.limit_in_bytes": "2000000"}
    assert memory(machine(tmp_path / "1", VERSION_1, one)) == 2_000_000
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory(machine(tmp_path / "max", VERSION_2, {"sys/fs/cgroup/memory.max": "max"})) == most
    assert 0 < memory() <= most


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_a_process_that_is_bound_to_one_core_plans_for_one():
    text = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    text += "from align_cluster.machine import cores; print(cores())"
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout == "1\n"
