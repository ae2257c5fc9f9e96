"""Text that people write by line: files of lines, JSON of one line, and what no prompt may hold.

Only a newline ends a line, and a carriage return before it belongs to it. `str.splitlines` also cuts at eight other
characters, such as U+2028, which stand inside of prompts and of valid JSON.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from pydantic_core import from_json

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


def strict_json(text: str | bytes) -> Any:
    """Return the value of JSON, which is UTF-8 where it comes as bytes.

    Raises ValueError for what is no JSON, and for what others read otherwise or not at all: a key that is blank or
    there twice, deep nesting, half of a surrogate pair, NaN, infinity, and whole numbers of more than 64 bits.
    """
    try:
        from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(str(error).replace("at line 1 column", "at column")) from None
    return json.loads(text, object_pairs_hook=_once, parse_int=_whole, parse_float=_finite)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        if not key.strip():
            raise ValueError("a key is blank")
        found[key] = value
    return found


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**63:
        raise ValueError(f"{digits[:20]}... is more than a whole number of 64 bits")
    return number


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def fault(text: str) -> str | None:
    """Say why a text can be no prompt, caption or name, as the end of a sentence; return None where it can."""
    if not text.strip():
        return "is blank"
    if "\0" in text:
        return "holds a NUL character"
    return "holds half of a character (a lone surrogate)" if _SURROGATE.search(text) else None
