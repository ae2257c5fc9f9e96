"""Run files and service files that ship with the package: found by name, listed, and copied to start from.

The repository has them in configs/, to which `align_cluster/run_files` is a link; a wheel has a folder in its place.
"""

import difflib
import os
import re
import shlex
from pathlib import Path

from align_cluster.errors import UserError
from align_cluster.files import user_path, writable, write_text

FOLDER = Path(__file__).parents[1] / "run_files"
_SCHEMA = re.compile(r"# yaml-language-server: \$schema=(\S+)\n")


def shipped() -> dict[str, Path]:
    """Return the shipped files by name, such as quickstart."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def find(path: str | Path) -> Path:
    """Return the file that a user named: the one at `path`, else the shipped one of that name.

    `quickstart`, `quickstart.yaml` and `configs/quickstart.yaml` all name the same shipped file. A path that names
    nothing is returned as it is.
    """
    file = user_path(path)
    if os.path.exists(file) and not os.path.isdir(file):  # False, not an error, where a folder is closed to us
        return file
    bare = file.parent in (Path(), Path("configs")) and file.suffix in ("", ".yaml")
    return shipped().get(file.stem, file) if bare else file


def nearest(path: Path) -> str | None:
    """Return the file that was probably meant by a `path` that names none: one beside it, or a shipped one's name."""
    beside = {file.name: str(file) for file in path.parent.glob("*.yaml")}
    near = difflib.get_close_matches(path.name, beside, n=1)
    return beside[near[0]] if near else next(iter(difflib.get_close_matches(path.stem, shipped(), n=1)), None)


def summaries() -> dict[str, str]:
    """Return the first clause of each shipped file's comment, by name."""
    texts = {name: file.read_text(encoding="utf-8").split("\n# ", 1)[1] for name, file in shipped().items()}
    return {name: re.split(r"[.:;]\s", text.replace("\n# ", " "))[0] for name, text in texts.items()}


def copy(name: str, out: Path, replace: bool = False) -> bool:
    """Copy a shipped file to `out`, and the schema that editors read beside it; return whether it is a service file.

    Raises UserError where no such file ships, and where `out` exists or cannot be written. `replace` writes over both
    files; else a schema that is there already stays.
    """
    files = shipped()
    if name not in files:
        near = difflib.get_close_matches(name, files, n=1)
        hint = f"did you mean {near[0]}?" if near else "`align-cluster list configs` names them"
        raise UserError(f"init: no run file {name!r} ships with align-cluster; {hint}")
    if os.path.exists(out) and not replace:
        raise UserError(f"{out} exists already; give --out another file, or --force to write over it")
    writable(out)
    text = files[name].read_text(encoding="utf-8")
    schema = _SCHEMA.match(text)[1]
    if str(out).isprintable():  # else a comment would end inside of the name
        text = text.replace(f"configs/{name}.yaml", shlex.quote(str(out)))
    write_text(out, text)
    if replace or not (out.parent / schema).exists():
        write_text(out.parent / schema, (FOLDER / schema).read_text(encoding="utf-8"))
    return schema.startswith("service")
