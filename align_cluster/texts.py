"""Text that people write by line: files of lines, JSON of one line, and what no prompt may hold.

Only a newline ends a line, and a carriage return before it belongs to it. `str.splitlines` also cuts at eight other
characters, such as U+2028, which stand inside of prompts and of valid JSON.
"""

from pathlib import Path

from align_cluster import files
from align_cluster.errors import UserError, unwritable

MOST = 2**28  # bytes of one file: two million prompts have about half of it


def read_text(path: str | Path, what: str) -> str:
    """Return a UTF-8 file's text, without a byte order mark. Raises UserError, which calls the file `what`."""
    try:
        return files.read_text(files.user_path(path), MOST, what)
    except FileNotFoundError:
        raise UserError(
            f"{what} {path} does not exist; give a path relative to {Path.cwd()} or an absolute one"
        ) from None


def lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank with their numbers, counted from 1, without blanks around them."""
    return [(number, stripped) for number, line in enumerate(text.split("\n"), 1) if (stripped := line.strip())]


def fault(text: str) -> str | None:
    """Say why a text can be no prompt, caption or name, as the end of a sentence; return None where it can."""
    if not text.strip():
        return "is blank"
    if unwritable(text):
        return "holds a NUL character" if "\0" in text else "holds half of a character (a lone surrogate)"
    return None
