"""Hashes of what a run reads besides its settings: prompts, images, models. A resumed run compares them."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.prompts import PROMPTS
from align_cluster.types import Prompt

BLOCK = 2**18  # bytes that are read at once
WHOLE = 64 * BLOCK  # bytes up to which all of a file is hashed; of a larger one, as many blocks at even distances


def inputs(config: RunConfig, prompts: list[Prompt], held_out: list[Prompt]) -> dict[str, str]:
    """Return a SHA-256 of each thing that the run reads, by the setting that names it.

    They are both lists of prompts, as they were loaded and with the images that they name, and every file or folder on
    this machine that a block's `reads` names. What a hub id stands for is not among them. Raises UserError for a file
    that cannot be read.
    """
    found = {}
    for where, source, loaded in (
        ("prompts", config.prompts, prompts),
        ("evaluate.prompts", config.evaluate.prompts, held_out),
    ):
        found[where] = _of_prompts(loaded, PROMPTS[source.kind].has_images)
    for where, block in config.blocks():
        for name in block.reads:
            value = getattr(block, name)
            if value and value != "embedded" and (path := Path(value).expanduser()).exists():
                found[f"{where}.{name}"] = digest(path)
    return found


def _of_prompts(prompts: list[Prompt], with_images: bool) -> str:
    images = {}
    if with_images:
        paths = list(dict.fromkeys(prompt.metadata["image"] for prompt in prompts))
        with ThreadPoolExecutor() as pool:
            images = dict(zip(paths, pool.map(lambda path: digest(Path(path)), paths), strict=True))
    rows = ([prompt.text, prompt.metadata, images.get(prompt.metadata.get("image"))] for prompt in prompts)
    return _joined(json.dumps(row, sort_keys=True) for row in rows)


def digest(path: Path) -> str:
    """Return a SHA-256 of a file, or of the names and contents of all files in a folder.

    Times do not count, nor do hidden files and pages for people (.md).
    """
    try:
        if path.is_file():
            return _of_file(path)
        names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file() and file.suffix != ".md")
        seen = (name for name in names if not any(part.startswith(".") for part in name.parts))
        return _joined(f"{name.as_posix()} {_of_file(path / name)}" for name in seen)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); let it be read, or give another path") from None


def _of_file(path: Path) -> str:
    size = path.stat().st_size
    count = min(-(-size // BLOCK), WHOLE // BLOCK)
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for place in range(count):
            file.seek(place * BLOCK if size <= WHOLE else place * (size - BLOCK) // (count - 1))
            found.update(file.read(BLOCK))
    return found.hexdigest()


def _joined(parts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{part}\n".encode())
    return found.hexdigest()
