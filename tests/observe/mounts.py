"""Small and read-only disks of a test's own, where the system lets users mount them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNSHARE = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
WORKS = (
    bool(shutil.which("unshare"))
    and not subprocess.run([*UNSHARE, "mount -t tmpfs tmpfs /mnt"], capture_output=True, check=False).returncode
)
needs_mounts = pytest.mark.skipif(not WORKS, reason="needs mounts in a user namespace")


def in_mount(folder: Path, mount: str, python: str) -> str:
    """What a Python program prints in a namespace in which `mount` (with the folder for {0}) was run."""
    command = [*UNSHARE, f'{mount.format(folder)} && exec "$0" -W ignore -c "$1"', sys.executable, python]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
