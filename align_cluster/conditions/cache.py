"""A store of encoded prompts on disk, addressed by content, with a bound. Several processes may use it at once."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from align_cluster.errors import UserError
from align_cluster.files import atomic
from align_cluster.settings import GIB
from align_cluster.types import Condition, Perturbation

Record = TypeVar("Record", Condition, Perturbation)

VARIABLE = "ALIGN_CLUSTER_CACHE_GIB"  # of the environment: the bound on one folder, in GiB
MOST_GIB = 20.0  # the bound on a large disk: 6,000 prompts of SD3.5 in fp32, 12,000 in bf16
SHARE = 0.1  # the bound on a small disk, as a share of its free space
LOOK = 0.02  # share of the bound that a process writes before it looks through the folder again
SLACK = 0.1  # share of the bound that is free after a clearance, so that clearances are rare
BLOCK = 4096  # bytes; a file takes whole blocks on most disks
STALE_S = 3600.0  # age of a temporary file that no living process writes any more


def default_folder() -> Path:
    """Return $ALIGN_CLUSTER_CACHE, or a folder in the user's cache directory."""
    home = os.environ.get("ALIGN_CLUSTER_CACHE")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "align_cluster"


class Cache(Generic[Record]):
    """Keeps records of one kind, Condition or Perturbation, in one .npz file for each key.

    A file appears whole or not at all. A file that cannot be read counts as absent. The time of a file is that of its
    last use. Both kinds share the bound of their folder.
    """

    def __init__(self, folder: Path, kind: type[Record]) -> None:
        self.kind, self.folder = kind, _folder(folder, kind)
        self.clearance = clearance_of(folder)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"

    def get(self, key: str) -> Record | None:
        """Return the record of a key, or None if it is absent or unreadable."""
        path = self._path(key)
        try:
            with np.load(path, allow_pickle=False) as data:
                values = {name: data[name] for name in data.files}
            record = self.kind(key, **{name: value if value.ndim else value.item() for name, value in values.items()})
        except Exception:  # a damaged zip file raises a dozen kinds of errors, and the record can be made again
            return None
        with suppress(OSError):  # another user's file, or one that another process has just deleted
            os.utime(path)
        return record

    def put(self, record: Record) -> None:
        """Write a record under its key; an earlier file of that key is replaced. Old records may have to go."""
        values = {name: value for name, value in vars(record).items() if name != "key"}
        with atomic(self._path(record.key)) as temporary:
            np.savez(temporary, **values)
            size = temporary.stat().st_size
        self.clearance.wrote(size)


class Clearance:
    """Deletes the records of a folder that were used longest ago, where all of them take more than `allowed`.

    A process looks through the folder each time that it has written LOOK of the bound. So a write costs the same in a
    large folder as in a small one, and each process that writes may exceed the bound by that share.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left = 0.0  # bytes that may be written before the next look

    def wrote(self, size: int) -> None:
        """Take note of a file of `size` bytes."""
        self.left -= _on_disk(size)
        if self.left < 0:
            self.left = LOOK * self.clear()

    def clear(self) -> float:
        """Delete what is too much, and return the bound in bytes."""
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        bound = allowed(self.folder, used)
        if used > bound:
            for _, size, path in files:
                path.unlink(missing_ok=True)  # another process may be clearing the same folder
                used -= size
                if used <= (1 - SLACK) * bound:
                    break
        return bound

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield (time of the last use, bytes on disk, path) of every record, and of what a killed process left.

        The user may have chosen a folder that holds other files. Only names that `Cache` gives are looked at.
        """
        for kind in (Condition, Perturbation):
            for folder, _, names in os.walk(_folder(self.folder, kind)):
                shard = os.path.basename(folder)
                for name in names:
                    temporary, path = name.startswith("."), Path(folder, name)
                    if len(shard) != 2 or path.suffix != ".npz" or not (temporary or name.startswith(shard)):
                        continue
                    with suppress(FileNotFoundError):
                        found = path.stat()
                        if not temporary or time.time() - found.st_mtime > STALE_S:
                            yield found.st_mtime, _on_disk(found.st_size), path


@cache
def clearance_of(folder: Path) -> Clearance:
    """Return this process's clearance of a folder, which counts what all of its caches write."""
    return Clearance(folder)


def allowed(folder: Path, used: int) -> float:
    """Return the bytes that a cache of `used` bytes may take.

    They are $ALIGN_CLUSTER_CACHE_GIB, or SHARE of the space that is free or the cache's own, at most MOST_GIB. Raises
    UserError where the variable is no number above 0.
    """
    told = os.environ.get(VARIABLE)
    if told is None:
        return min(MOST_GIB * GIB, SHARE * (shutil.disk_usage(folder).free + used))
    with suppress(ValueError):
        if float(told) > 0:
            return float(told) * GIB
    raise UserError(f"{VARIABLE} is {told!r}: set it to the GiB that encoded prompts may take on disk, or unset it")


def _folder(folder: Path, kind: type) -> Path:
    return folder / f"{kind.__name__.lower()}s"


def _on_disk(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def cached(
    kind: type[Record], texts: list[str], key: Callable[[str], str], make: Callable[[list[str]], list[Record]]
) -> list[Record]:
    """Return the records of texts from the default folder. One call of `make` produces the missing ones.

    They are stored for the next call. `key` maps a text to its content address.
    """
    cache = Cache(default_folder(), kind)
    found = {text: cache.get(key(text)) for text in texts}
    missing = [text for text, record in found.items() if record is None]
    for text, record in zip(missing, make(missing) if missing else [], strict=True):
        cache.put(record)
        found[text] = record
    return [found[text] for text in texts]
