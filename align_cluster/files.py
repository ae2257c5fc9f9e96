"""The only way in which this package writes files: whole or not at all, and what to say where a disk refuses."""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from align_cluster.errors import UserError

# What a disk says that is full, over its quota or read-only: nothing that a program did wrong.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """A disk that is full or read-only becomes a UserError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else _code(error)
        if code not in STORAGE[:4]:
            raise
        raise UserError(
            f"{getattr(error, 'filename', None) or path} cannot be written ({os.strerror(code)}); make room, or "
            "let it be written, and go on with --resume auto"
        ) from error


def _code(error: SafetensorError) -> int | None:
    """The system's number of an error that only its text tells."""
    told = re.search(r"os error (\d+)", str(error))
    return int(told[1]) if told else None


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; a clean exit renames it over `path`, an exception removes it.

    A reader therefore sees the old file or the new one, never half of one. The suffix of `path` is kept, because
    PIL and others choose the format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; a clean exit renames it to `path`, an exception removes it.

    UserError at once where `path` is there already, or cannot be made.
    """
    if path.exists():
        raise UserError(f"--out {path} exists already, and nothing is overwritten; give a folder that is not there yet")
    staged = path.with_name(f".{uuid.uuid4().hex}")
    try:
        staged.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be made ({error.strerror}); give another folder") from error
    try:
        yield staged
        os.rename(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON; ValueError on NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any | None:
    """The parsed file, or None where it does not exist (a run that has not come so far)."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
