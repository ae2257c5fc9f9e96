"""What several benchmarks need: where and on which commit they ran, and a free port."""

import os
import platform
import socket
import subprocess
from pathlib import Path


def commit() -> str:
    """Short hash of the checked-out commit, with a + where files differ from it."""
    here = Path(__file__).parent
    commands = (["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    found, changed = (subprocess.run(c, cwd=here, capture_output=True, text=True).stdout.strip() for c in commands)
    return found + ("+" if changed else "")


def machine() -> str:
    """Describe the machine as results keep it."""
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
