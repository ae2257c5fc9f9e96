"""A store of encoded prompts on disk, addressed by content. Several processes may write to it at once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from align_cluster.files import atomic
from align_cluster.types import Condition, Perturbation

Record = TypeVar("Record", Condition, Perturbation)


def default_folder() -> Path:
    """Return $ALIGN_CLUSTER_CACHE, or a folder in the user's cache directory."""
    home = os.environ.get("ALIGN_CLUSTER_CACHE")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "align_cluster"


class Cache(Generic[Record]):
    """Keeps records of one kind, Condition or Perturbation, in one .npz file for each key.

    A file appears whole or not at all. A file that cannot be read counts as absent.
    """

    def __init__(self, folder: Path, kind: type[Record]) -> None:
        self.kind, self.folder = kind, folder / f"{kind.__name__.lower()}s"

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"

    def get(self, key: str) -> Record | None:
        """Return the record of a key, or None if it is absent or unreadable."""
        try:
            with np.load(self._path(key), allow_pickle=False) as data:
                values = {name: data[name] for name in data.files}
            return self.kind(key, **{name: value if value.ndim else value.item() for name, value in values.items()})
        except Exception:  # a damaged zip file raises a dozen kinds of errors, and the record can be made again
            return None

    def put(self, record: Record) -> None:
        """Write a record under its key; an earlier file of that key is replaced."""
        values = {name: value for name, value in vars(record).items() if name != "key"}
        with atomic(self._path(record.key)) as temporary:
            np.savez(temporary, **values)


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
