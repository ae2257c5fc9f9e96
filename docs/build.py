"""Builds the documentation site into site/: `python docs/build.py`. Any broken link or missing page is an error.

The settings reference is made from the models of the run file and of the service file, by the code behind
`align-cluster explain`, and lies in docs/settings/, which is not under version control.
"""

import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from align_cluster.config.reference import settings, topics
from align_cluster.config.run import RunConfig
from align_cluster.serving.config import ServiceConfig
from align_cluster.settings import Root, Section

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs/settings"
INTRO = """# Settings

A run file holds these settings. Each block has a page. `align-cluster explain BLOCK` prints the same in a terminal, and
`align-cluster schema` gives it to editors. A dot leads into a block: `--set optimizer.lr=1e-4` sets `optimizer`'s `lr`.
A block with a `kind` has the settings of that kind, such as `algorithm.nft` for `algorithm: {kind: nft}`.

"""
SERVICE = """# Service files

`align-cluster serve-rewards` reads a service file. Its `rewards` have the settings of [rewards](rewards.md), without
`weight`, `role`, `on_failure` and `pool`, which belong to a run.

"""


def cell(text: str) -> str:
    """Return text as one cell of a Markdown table; signs outside of code that Markdown would read are escaped."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(re.sub(r"([*\[\]<])", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts))


def table(block: type[Section]) -> Iterator[str]:
    """Yield the lines of a table with the settings of one block."""
    rows = settings(block)
    if not rows:
        return
    yield "| setting | type | default | meaning |"
    yield "|---|---|---|---|"
    for row in rows:
        default = "must be given" if row.default is None else f"`{row.default}`"
        yield f"| `{row.name}` | {cell(row.type.replace(' | ', ', '))} | {cell(default)} | {cell(row.meaning)} |"
    yield ""


def page(known: Mapping[str, type[Section]], name: str, seen: dict[type[Section], str]) -> str:
    """Return the page of one block of a file, with all blocks inside it.

    Equal blocks are described once; `seen` holds where, and grows.
    """
    lines = [f"# {name}", ""]
    for path, block in known.items():
        if path.split(".")[0] != name:
            continue
        if path != name:
            lines += [f"## {path} {{ #{path} }}", ""]
        if first := seen.get(block):
            lines += [f"It has the settings of [{first}]({first.split('.')[0]}.md#{first}).", ""]
            continue
        seen[block] = path
        lines += [inspect.cleandoc(block.__doc__ or ""), "", *table(block)]
    return "\n".join(lines)


def write_settings(folder: Path) -> list[str]:
    """Write the settings reference into `folder` anew, and return the names of its pages."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    known = topics(RunConfig)
    names = list(dict.fromkeys(path.split(".")[0] for path in known if path))
    seen: dict[type[Section], str] = {}
    pages = {"index": INTRO + "\n".join(table(RunConfig)), **{name: page(known, name, seen) for name in names}}
    pages["service"] = SERVICE + service(topics(ServiceConfig))
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return list(pages)


def service(known: Mapping[str, type[Root] | type[Section]]) -> str:
    """Return the blocks of a service file, but for its rewards."""
    lines: list[str] = []
    for path, block in known.items():
        if path.split(".")[0] != "rewards":
            lines += [f"## {path} {{ #{path} }}", ""] if path else []
            lines += [inspect.cleandoc(block.__doc__ or ""), "", *table(block)]
    return "\n".join(lines)


if __name__ == "__main__":
    write_settings(PAGES)
    zensical = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    raise SystemExit(subprocess.run(zensical, cwd=ROOT, check=False).returncode)
