"""The only way in which this package writes files: a file appears whole or not at all."""

import errno
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from align_cluster.errors import UserError, unwritable
from align_cluster.plain import json_value

# Error numbers of a disk that is full, over its quota, read-only or failing. They are no fault of the program.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

LONGEST_NAME = 255  # bytes in the name of a file or folder, on the usual file systems
LONGEST_PATH = 4000  # characters: Linux takes 4095 bytes, with the names of a run's files


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn the error of a full, over-quota or read-only disk into a UserError that says what to do.

    `path` is named in the message where the error does not name a file. Other errors pass through.
    """
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
    """Return the operating system's error number from the text of a SafetensorError, which has no field for it."""
    told = re.search(r"os error (\d+)", str(error))
    return int(told[1]) if told else None


def user_path(text: str | Path) -> Path:
    """Return the path that a user typed, with ~ expanded. Raises UserError for a name that no file can have."""
    name = str(text)
    if unwritable(name):
        raise UserError(f"{name!r} holds a character that no file can have; give another path")
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"{name} begins with the home of a user who is not here; write the path in full") from None
    if any(len(part.encode()) > LONGEST_NAME for part in path.parts) or len(name) > LONGEST_PATH:
        raise UserError(f"{name[:40]}... is too long for a path, or for a name in one; give a shorter path")
    return path


def read_text(path: Path, most: int, what: str = "") -> str:
    """Return a UTF-8 file of up to `most` bytes, without a byte order mark. Errors call it `what` before its path.

    Raises FileNotFoundError where there is none, and UserError for what is no file of text, such as a device or a pipe.
    """
    shown = f"{what} {path}".strip()
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe would wait for a writer
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise IsADirectoryError
            content = file.read(most + 1) if about.st_size <= most else b""
        if max(about.st_size, len(content)) > most:  # files of /proc have no size
            raise UserError(f"{shown} has more than {most} bytes; shorten it, or give a file of text")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise
    except IsADirectoryError:  # or a device, or a pipe
        raise UserError(f"{shown} cannot be read: it is no file; give the path of a text file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{shown} cannot be read ({error}); it must be UTF-8 text") from None


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; a clean exit renames it over `path`, an exception removes it.

    A reader sees the old file or the new one, never half of one. The temporary path keeps the suffix of `path`, because
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

    Raises UserError at once if `path` exists or the folder cannot be made.
    """
    staged = path.with_name(f".{uuid.uuid4().hex}")
    try:
        there = path.exists()
        if not there:
            staged.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be made ({error.strerror}); give another folder") from error
    if there:
        raise UserError(f"--out {path} exists already, and nothing is overwritten; give a folder that is not there yet")
    try:
        yield staged
        os.rename(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically, as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def writable(path: Path) -> None:
    """Raise UserError where no file can be written at `path`; nothing is left there."""
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            return
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give a file in a folder that is there") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON. Raises ValueError on NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def save_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write numpy arrays as a safetensors file atomically; the same content has the same bytes."""
    from safetensors.numpy import save_file

    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata)
        sort_metadata(temporary)


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by name: its library writes them in an order that differs each time.

    The file is written anew, because the library's own can be read by this user alone.
    """
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # The tensors begin at a multiple of 8 bytes.
    path.unlink()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def read_json(path: Path) -> Any | None:
    """Return the parsed file, or None if it does not exist. Raises UserError where it is no JSON."""
    try:
        return json_value(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again from where it was written") from None
