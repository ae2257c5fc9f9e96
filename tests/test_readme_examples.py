"""What the READMEs print as complete runs as it is printed."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import align_cluster
from align_cluster.config.check import check
from align_cluster.config.load import load
from align_cluster.rewards import REWARDS

from .inprocess import train

ROOT = Path(__file__).parents[1]
FOLDERS = ("prompts", "conditions", "rollouts", "rewards", "weights", "checkpoint", "embedded")
COMMAND = ".venv/bin/align-cluster train shapes.yaml"


def blocks(language: str) -> list[str]:
    """The code blocks of the package's README in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.M)


def overrides(command: str) -> list[str]:
    """What a printed command sets."""
    words = shlex.split(command.replace("\\\n", " "))
    return words[words.index("--set") + 1 :]


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the README's first example has written its files; commands run there."""
    *files, command = blocks("sh")[0].splitlines()
    assert command == COMMAND
    subprocess.run(["bash", "-euo", "pipefail", "-c", "\n".join(files)], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_example_in_a_folders_readme_runs(folder, tmp_path, monkeypatch):
    readme = Path(align_cluster.__file__).parent / folder / "README.md"
    (text,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, str(readme), "exec"), {"__name__": "example"})


def test_the_readmes_own_prompts_and_its_own_reward_train_as_they_are_printed(shapes, monkeypatch):
    assert check(load("shapes.yaml")) == []
    (shapes / "brightness.py").write_text(blocks("python")[0], encoding="utf-8")
    monkeypatch.syspath_prepend(shapes)
    settings = overrides(blocks("sh")[2])
    kind = settings[0].partition("=")[2]
    monkeypatch.setitem(REWARDS, kind, None)  # what comes there is taken back after the test
    del REWARDS[kind]
    config = load("shapes.yaml", [*settings, "steps=1", "rollout.group_size=2", "rollout.steps=2"])
    assert check(config) == []
    done = train(config, shapes / "run")
    assert 0 < done.before["reward/bright"] < 1 and done.lora.is_file()


def test_the_readmes_own_model_is_a_valid_run(shapes):
    config = load("shapes.yaml", overrides(blocks("sh")[1]))
    assert (config.backbone.path, config.backbone.height) == ("stabilityai/stable-diffusion-3.5-medium", 512)
    assert check(config) == []


def test_every_file_that_the_readme_links_is_there():
    targets = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(targets) > 10
    assert [target for target in targets if not (ROOT / target).exists()] == []
