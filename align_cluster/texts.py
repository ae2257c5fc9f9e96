"""Text that people write by line: files of lines, JSON of one line, and what no prompt may hold.

Only a newline ends a line, and a carriage return before it belongs to it. `str.splitlines` also cuts at eight other
characters, such as U+2028, which stand inside of prompts and of valid JSON.
"""

import re
from pathlib import Path

from align_cluster.errors import UserError

MOST = 2**28  # bytes of one file: two million prompts have about half of it
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(path: str | Path, what: str) -> str:
    """Return a UTF-8 file's text, without a byte order mark. Raises UserError, which calls the file `what`."""
    if not (shown := str(path)).isprintable():
        shown = repr(shown)
    try:
        file = Path(path).expanduser()
        if not file.exists():
            raise UserError(f"{what} {shown} does not exist; give a path relative to {Path.cwd()} or an absolute one")
        if not file.is_file():  # a pipe or a device would never end
            raise UserError(f"{what} {shown} is no file; give the path of a text file")
        if file.stat().st_size > MOST:
            raise UserError(f"{what} {shown} has more than {MOST} bytes; divide it, or give a file of text")
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{what} {shown} cannot be read ({error}); it must be UTF-8 text") from None


def lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank with their numbers, counted from 1, without blanks around them."""
    return [(number, stripped) for number, line in enumerate(text.split("\n"), 1) if (stripped := line.strip())]


def fault(text: str) -> str | None:
    """Say why a text can be no prompt, caption or name, as the end of a sentence; return None where it can."""
    if not text.strip():
        return "is blank"
    if "\0" in text:
        return "holds a NUL character"
    return "holds half of a character (a lone surrogate)" if _SURROGATE.search(text) else None
