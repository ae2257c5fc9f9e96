"""Folders of files that count as a checkpoint only if they are complete and undamaged.

    step_000120/manifest.json      sizes and SHA-256 of the files and of itself; facts to choose by, such as a score
    step_000120/...                the files

On a local disk a folder is written under a temporary name, synced, and renamed. An object store has no rename, so there
the manifest is written last, and a folder without one does not count. A reader checks every byte, and takes the
checkpoint before a damaged one. A manifest may come from anybody, so it names plain files of its own folder alone, and
links are neither read nor followed.
"""

import hashlib
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, ValidationError

from align_cluster.errors import UserError
from align_cluster.files import user_path
from align_cluster.plain import json_value
from align_cluster.settings import Name

MANIFEST = "manifest.json"
FORMAT = 1
MANIFEST_BYTES = 2**20  # a manifest has a hundred bytes for each of a handful of files
PROBE_S = 60.0  # seconds for a store to take, return and delete a few bytes; one that is there needs under a second
T = TypeVar("T")


class Damaged(Exception):
    """A checkpoint is torn, truncated or changed; the message says what is wrong."""


class _File(BaseModel):
    bytes: Annotated[StrictInt, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _About(BaseModel):
    """Holds the facts that a checkpoint is chosen by; others may stand beside them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    score: StrictFloat | StrictInt | None = None
    good: StrictBool = True


class _Manifest(BaseModel):
    format: StrictInt
    step: StrictInt
    about: _About
    files: dict[Name, _File]


def step_of(name: str) -> int | None:
    """Return the step of the checkpoint in a folder of this name, or None for any other name."""
    found = re.fullmatch(r"step_([0-9]{6,12})", name)
    return int(found[1]) if found else None


def unusable(path: str) -> str | None:
    """Say why checkpoints cannot be kept under a path that names no known or no lasting place, or return None."""
    from fsspec import available_protocols
    from fsspec.core import split_protocol

    protocol = split_protocol(path)[0]
    if protocol == "memory":
        return "which ends with the process, and its checkpoints with it"
    if "::" in path or protocol and protocol not in available_protocols():
        return "which is of no file system that fsspec knows"
    return None


class Store:
    """Keeps checkpoints in the folder `path`, local or of any file system that fsspec knows.

    The constructor touches nothing. It raises UserError if the file system's package is missing.
    """

    def __init__(self, path: str) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.path = path
        try:
            self.files, self.root = fsspec.core.url_to_fs(path if "://" in path else str(user_path(path)))
        except Exception as error:  # each file system has its own errors
            raise self._unusable(error) from None
        self.local = isinstance(self.files, LocalFileSystem)

    def _unusable(self, error: Exception) -> UserError:
        if isinstance(error, UserError):
            return error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return UserError(
            f"checkpoint.path: {self.path} cannot keep checkpoints ({reason}); give a folder, or an address that this "
            "machine may write to, such as s3://bucket/runs"
        )

    def probe(self) -> None:
        """Write, read, rename (on a local disk) and delete a few bytes, as for a checkpoint.

        Raises UserError where that fails, or takes longer than PROBE_S.
        """
        found: list[Exception | None] = []

        def work() -> None:
            folder, content = f"{self.root}/.{uuid.uuid4().hex}.partial", {"probe": os.urandom(16)}
            try:
                (self._write_local if self.local else self._write_remote)(folder, content)
                if self.files.cat_file(f"{folder}/probe") != content["probe"]:
                    raise OSError("it returns other bytes than it was given")
                self.files.rm(folder, recursive=True)
                found.append(None)
            except Exception as error:  # each file system has its own errors
                found.append(error)

        thread = threading.Thread(target=work, name="probe of checkpoint.path", daemon=True)
        thread.start()
        thread.join(PROBE_S)
        error = found[0] if found else TimeoutError(f"no answer in {PROBE_S:g} s")
        if error:
            raise self._unusable(error)

    def folder(self, step: int) -> str:
        """Return the folder of a step's checkpoint."""
        return f"{self.root}/step_{step:06d}"

    def steps(self) -> list[int]:
        """Return the steps of complete checkpoints, ascending. Their files are not verified yet."""
        found = {step for name in self.folders() if (step := step_of(name)) is not None}
        return sorted(step for step in found if self._is_there(step))

    def _is_there(self, step: int) -> bool:
        linked = self.local and os.path.islink(self.folder(step))
        return not linked and self.files.exists(f"{self.folder(step)}/{MANIFEST}")

    def folders(self) -> set[str]:
        """Return the names of everything in the store's folder."""
        self.files.invalidate_cache()
        try:
            return {entry.rstrip("/").rsplit("/", 1)[-1] for entry in self.files.ls(self.root, detail=False)}
        except FileNotFoundError:
            return set()
        except Exception as error:  # each file system has its own errors
            raise self._unusable(error) from None

    def about(self, step: int) -> dict[str, Any]:
        """Return the facts that `write` stored beside the files. Raises Damaged if they cannot be read."""
        return self._manifest(step)["about"]

    def known(self) -> dict[int, dict[str, Any]]:
        """Return the facts of each complete checkpoint by its step, ascending, without those that cannot be read."""
        found = {}
        for step in self.steps():
            with suppress(Damaged):
                found[step] = self.about(step)
        return found

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
            self.delete(step_of(folder.rsplit("/", 1)[-1]))
        self.files.makedirs(folder, exist_ok=True)
        for name, data in content.items():  # the manifest comes last and makes the checkpoint count
            self.files.pipe_file(f"{folder}/{name}", data)

    def read(self, step: int) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Return (files, about) of a checkpoint, with every byte checked. Raises Damaged if a byte has changed."""
        manifest = self._manifest(step)
        files = {}
        for name, expected in manifest["files"].items():
            data = self._bytes(step, name, expected["bytes"] + 1)
            if len(data) != expected["bytes"]:
                raise Damaged(f"{name} has {len(data)} bytes instead of {expected['bytes']}")
            if hashlib.sha256(data).hexdigest() != expected["sha256"]:
                raise Damaged(f"the checksum of {name} is wrong")
            files[name] = data
        return files, manifest["about"]

    def _bytes(self, step: int, name: str, most: int) -> bytes:
        """Return the first `most` bytes of a file. Raises Damaged where it is missing, unreadable or a link."""
        path = f"{self.folder(step)}/{name}"
        try:
            if not self.local:
                return self.files.cat_file(path, end=most)
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                return file.read(most)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({type(error).__name__})") from None

    def _manifest(self, step: int) -> dict[str, Any]:
        try:
            manifest = json_value(self._bytes(step, MANIFEST, MANIFEST_BYTES))
            own = manifest.pop("sha256")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Damaged(f"{MANIFEST} cannot be read ({type(error).__name__})") from None
        if _sum(manifest) != own:
            raise Damaged(f"the checksum of {MANIFEST} is wrong")
        if manifest.get("format") != FORMAT:
            raise Damaged(f"its format is {manifest.get('format')}, and this version reads {FORMAT}")
        try:
            _Manifest.model_validate(manifest)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise Damaged(f"{where!r} in {MANIFEST} is none of a checkpoint's ({first['msg']})") from None
        if manifest["step"] != step:
            raise Damaged(f"{MANIFEST} is of step {manifest['step']}")
        return manifest

    def newest(
        self,
        note: Callable[[str], None],
        wanted: Callable[[dict[str, Any]], bool] = lambda about: True,
        make: Callable[[int, dict[str, bytes]], T] = lambda step, files: (step, files),
    ) -> T | None:
        """Return what `make` makes of (step, files) of the newest undamaged checkpoint whose `about` is wanted.

        `note` is called with a sentence about each damaged checkpoint; `make` may find one too, by raising Damaged.
        None where there is no checkpoint left.
        """
        for step in reversed(self.steps()):
            try:
                if wanted(self.about(step)):
                    return make(step, self.read(step)[0])
            except Damaged as error:
                note(f"checkpoint {self.folder(step)} is damaged: {error}; the one before it is taken")
        return None

    def prune(self, keep: int, keep_best: bool) -> None:
        """Delete all checkpoints but the newest `keep`, the newest good one and, with `keep_best`, the best one."""
        steps, told = self.steps(), self.known()
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
