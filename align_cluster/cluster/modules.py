"""Modules of the user's, which hold the classes that a run names by import path, as a job takes them along."""

import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from align_cluster.config.run import RunConfig
from align_cluster.kinds import is_path

OURS = "align_cluster"


def copy_modules(config: RunConfig, folder: Path) -> None:
    """Copy into `folder` each module that the run names, and what it has imported from beside it; only .py files.

    Installed packages stay where they are: the cluster has to have them.
    """
    for source in sorted(set(_sources(config))):
        if source.is_dir():
            for file in source.rglob("*.py"):
                target = folder / source.name / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        else:
            shutil.copyfile(source, folder / source.name)


def _sources(config: RunConfig) -> Iterator[Path]:
    """Yield the files and the packages' folders; settings have imported the modules when they were checked."""
    kinds = (getattr(block, "kind", None) for _, block in config.blocks())
    named = {kind.partition(":")[0].partition(".")[0] for kind in kinds if is_path(kind)}
    tops = {name: source for name in list(sys.modules) if "." not in name and (source := _source(name))}
    beside = {tops[name].parent for name in named if name in tops}
    yield from (source for name, source in tops.items() if source.parent in beside and name != OURS)


def _source(name: str) -> Path | None:
    """Return the file, or the folder of the package, that a module was read from; None where it is installed."""
    module = sys.modules[name]
    file = getattr(module, "__file__", None)
    if file is None or not file.endswith(".py"):
        return None
    path = Path(file).resolve()
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib")}
    if any(path.is_relative_to(place) for place in installed):
        return None
    return path.parent if hasattr(module, "__path__") else path
