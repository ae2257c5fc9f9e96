import re
from pathlib import Path

import pytest

import align_cluster

FOLDERS = ("prompts", "conditions", "rollouts", "rewards", "weights", "checkpoint", "embedded")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_example_in_a_folders_readme_runs(folder, tmp_path, monkeypatch):
    readme = Path(align_cluster.__file__).parent / folder / "README.md"
    (text,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, str(readme), "exec"), {"__name__": "example"})
