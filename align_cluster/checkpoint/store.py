"""Folders of files that count as a checkpoint only if they are complete and undamaged.

    step_000120/manifest.json      sizes and SHA-256 of the files and of itself; facts to choose by, such as a score
    step_000120/...                the files

On a local disk a folder is written under a temporary name, synced, and renamed. An object store has no rename, so there
the manifest is written last, and a folder without one does not count. A reader checks every byte, and takes the
checkpoint before a damaged one.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from align_cluster.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1


class Damaged(Exception):
    """A checkpoint is torn, truncated or changed; the message says what is wrong."""


class Store:
    """Keeps checkpoints in the folder `path`, local or of any file system that fsspec knows.

    The constructor touches nothing. It raises UserError if the file system's package is missing.
    """

    def __init__(self, path: str) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        try:
            self.files, self.root = fsspec.core.url_to_fs(path)
        except (ImportError, ValueError) as error:
            raise UserError(f"checkpoint.path {path} cannot be used ({error})") from None
        self.path, self.local = path, isinstance(self.files, LocalFileSystem)

    def folder(self, step: int) -> str:
        """Return the folder of a step's checkpoint."""
        return f"{self.root}/step_{step:06d}"

    def steps(self) -> list[int]:
        """Return the steps of complete checkpoints, ascending. Their files are not verified yet."""
        found = [int(name[5:]) for name in self.folders() if name.startswith("step_") and name[5:].isdigit()]
        return sorted(step for step in found if self.files.exists(f"{self.folder(step)}/{MANIFEST}"))

    def folders(self) -> set[str]:
        """Return the names of everything in the store's folder."""
        self.files.invalidate_cache()
        try:
            return {entry.rstrip("/").rsplit("/", 1)[-1] for entry in self.files.ls(self.root, detail=False)}
        except FileNotFoundError:
            return set()

    def about(self, step: int) -> dict[str, Any]:
        """Return the facts that `write` stored beside the files. Raises Damaged if they cannot be read."""
        return self._manifest(step)["about"]

    def write(self, step: int, files: dict[str, bytes], about: dict[str, Any]) -> None:
        """Write one checkpoint, and replace an earlier one of the same step.

        Raises OSError if the write fails. On a local disk nothing is left behind.
        """
        sums = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
        manifest = {"format": FORMAT, "step": step, "about": about, "files": sums}
        content = files | {MANIFEST: (json.dumps(manifest | {"sha256": _sum(manifest)}, indent=1) + "\n").encode()}
        (self._write_local if self.local else self._write_remote)(self.folder(step), content)

    def _write_local(self, folder: str, content: dict[str, bytes]) -> None:
        root, unique = Path(self.root), uuid.uuid4().hex
        root.mkdir(parents=True, exist_ok=True)
        staged, old = root / f".{unique}.partial", root / f".{unique}.old"
        try:
            staged.mkdir()
            for name, data in content.items():
                with open(staged / name, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            _sync_folder(staged)
            if Path(folder).exists():
                os.rename(folder, old)
            os.rename(staged, folder)
            _sync_folder(root)
        finally:
            for leftover in (staged, old):
                shutil.rmtree(leftover, ignore_errors=True)

    def _write_remote(self, folder: str, content: dict[str, bytes]) -> None:
        if self.files.exists(folder):
            self.delete(int(folder[-6:]))
        self.files.makedirs(folder, exist_ok=True)
        for name, data in content.items():  # the manifest comes last and makes the checkpoint count
            self.files.pipe_file(f"{folder}/{name}", data)

    def read(self, step: int) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Return (files, about) of a checkpoint, with every byte checked. Raises Damaged if a byte has changed."""
        manifest = self._manifest(step)
        files = {}
        for name, expected in manifest["files"].items():
            try:
                data = self.files.cat_file(f"{self.folder(step)}/{name}")
            except OSError as error:
                raise Damaged(f"{name} cannot be read ({type(error).__name__})") from None
            if len(data) != expected["bytes"]:
                raise Damaged(f"{name} has {len(data)} bytes instead of {expected['bytes']}")
            if hashlib.sha256(data).hexdigest() != expected["sha256"]:
                raise Damaged(f"the checksum of {name} is wrong")
            files[name] = data
        return files, manifest["about"]

    def _manifest(self, step: int) -> dict[str, Any]:
        try:
            manifest = json.loads(self.files.cat_file(f"{self.folder(step)}/{MANIFEST}"))
            own = manifest.pop("sha256")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise Damaged(f"{MANIFEST} cannot be read ({type(error).__name__})") from None
        if _sum(manifest) != own:
            raise Damaged(f"the checksum of {MANIFEST} is wrong")
        if manifest["format"] != FORMAT:
            raise Damaged(f"its format is {manifest['format']}, and this version reads {FORMAT}")
        if manifest["step"] != step:
            raise Damaged(f"{MANIFEST} is of step {manifest['step']}")
        return manifest

    def newest(
        self, note: Callable[[str], None], wanted: Callable[[dict[str, Any]], bool] = lambda about: True
    ) -> tuple[int, dict[str, bytes]] | None:
        """Return (step, files) of the newest undamaged checkpoint with an `about` that is wanted, or None.

        `note` is called with a sentence about each damaged checkpoint.
        """
        for step in reversed(self.steps()):
            try:
                if wanted(self.about(step)):
                    return step, self.read(step)[0]
            except Damaged as error:
                note(f"checkpoint {self.folder(step)} is damaged: {error}; the one before it is taken")
        return None

    def prune(self, keep: int, keep_best: bool) -> None:
        """Delete all checkpoints but the newest `keep`, the newest good one and, with `keep_best`, the best one."""
        steps, told = self.steps(), {}
        for step in steps:
            with suppress(Damaged):
                told[step] = self.about(step)
        good = [step for step, about in told.items() if about.get("good", True)]
        scored = [step for step, about in told.items() if about.get("score") is not None] if keep_best else []
        best = sorted(scored, key=lambda step: (told[step]["score"], step))
        for step in set(steps) - {*steps[-keep:], *good[-1:], *best[-1:]}:
            self.delete(step)

    def delete(self, step: int) -> None:
        """Delete a checkpoint, its manifest first, so that an interrupted deletion leaves no checkpoint."""
        self.files.rm_file(f"{self.folder(step)}/{MANIFEST}")
        self.files.rm(self.folder(step), recursive=True)

    def clean(self) -> None:
        """Remove what killed writers have left behind."""
        if self.local and os.path.isdir(self.root):
            for leftover in Path(self.root).glob(".*"):
                if leftover.suffix in (".partial", ".old"):
                    shutil.rmtree(leftover, ignore_errors=True)


def _sum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
