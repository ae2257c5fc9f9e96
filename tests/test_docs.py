"""The documentation says what the code does: its commands parse, and its settings reference is complete."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from align_cluster.cli import build_parser
from align_cluster.config.reference import settings, topics
from align_cluster.config.run import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "deploy" / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent.name != "settings"),
]
BUILD = runpy.run_path(str(ROOT / "docs/build.py"), run_name="build")


def fences(page: Path) -> list[tuple[str, str]]:
    """The code blocks of a page, as (what stands behind the fence, text)."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The lines of code blocks that call align-cluster, however it is started."""
    text = "\n".join(block for _, block in fences(page)).replace("\\\n", " ")
    return re.findall(r"^(?:\S*bin/)?align-cluster ([^>\n]*)|python command.py (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_the_documentation_prints_is_one(page):
    for found in commands(page):
        args = build_parser().parse_args(shlex.split("".join(found)))
        assert callable(args.command)
        config = getattr(args, "config", None)
        assert config is None or "/" not in config or (ROOT / config).is_file(), config


def test_commands_are_found():
    assert sum(len(commands(page)) for page in PAGES) > 20


def test_run_files_with_a_name_in_the_documentation_are_the_readmes_which_are_tested():
    named = [text for page in PAGES for about, text in fences(page) if about.startswith("yaml title=")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert named and all(text in readme for text in named)


def test_the_settings_reference_describes_every_setting_of_every_block_and_its_pages_are_in_the_menu(tmp_path):
    pages = BUILD["write_settings"](tmp_path)
    texts = {name: (tmp_path / f"{name}.md").read_text(encoding="utf-8") for name in pages}
    for path, block in topics(RunConfig).items():
        text = texts[path.split(".")[0] or "index"]
        if "." in path:
            _, text = text.split(f"\n## {path} {{ #{path} }}\n")
        text = text.split("\n## ")[0]
        if target := re.search(r"It has the settings of \[(.*?)\]\((\w+)\.md", text):
            text = texts[target[2]]
        for row in settings(block):
            assert re.search(rf"^\| `{row.name}` \| .+ \| .+ \| .*", text, re.MULTILINE), (path, row.name)
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"settings/{name}.md" in menu for name in pages)
    assert len(pages) == len(re.findall(r"settings/\w+\.md", menu))
