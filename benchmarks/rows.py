"""Rows of a benchmark's runs, a JSON object a line, added as each run ends: what is missing can be run later."""

import json
from pathlib import Path


def read(path: Path) -> list[dict]:
    """All rows, oldest first; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path: Path, row: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
