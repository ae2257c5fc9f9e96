"""A content-addressed store of encoded prompts, on disk, safe with several writers."""

import os
import tempfile
from pathlib import Path

import numpy as np

from align_cluster.types import Condition


def default_folder() -> Path:
    """$ALIGN_CLUSTER_CACHE, or a folder in the user's cache directory."""
    home = os.environ.get("ALIGN_CLUSTER_CACHE")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "align_cluster"


class ConditionCache:
    """Conditions by key. A file appears whole or not at all; one that cannot be read is treated as absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "conditions"

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"

    def get(self, key: str) -> Condition | None:
        try:
            with np.load(self._path(key)) as data:
                return Condition(key, data["sequence"], data["pooled"])
        except Exception:  # a damaged zip file fails in a dozen ways; whatever cannot be read is encoded again
            return None

    def put(self, condition: Condition) -> None:
        path = self._path(condition.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, sequence=condition.sequence, pooled=condition.pooled)
        os.replace(temporary, path)
