"""The wheel, built and installed where the repository is not."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["steps=1", "prompts_per_step=2", "rollout.group_size=4", "rollout.steps=4", "learner.updates_per_step=1"]
SMALL += ["evaluate.count=2", "evaluate.images_per_prompt=1", "evaluate.grid_prompts=2", "evaluate.grid_columns=1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built from a copy with the installed setuptools, because a build writes into its tree."""
    tree = tmp_path_factory.mktemp("tree") / "align_cluster"
    leave = shutil.ignore_patterns(".git", ".venv", "__pycache__", "build", "*.egg-info", "runs", "tests", "benchmarks")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=leave)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tree.parent, tree], check=True, capture_output=True)
    (file,) = tree.parent.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Function: runs a program of a new environment that has the wheel, and this environment's packages besides."""
    home = tmp_path_factory.mktemp("elsewhere")
    venv.create(home / "venv", with_pip=False)
    python = home / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, wheel], check=True, capture_output=True)
    (packages,) = (home / "venv" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read: no sources
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *arguments: str) -> str:
        command = [python.with_name(program), *arguments]
        done = subprocess.run(command, cwd=home, env=clean, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.home = home
    return run


def test_a_wheel_holds_the_run_files_and_says_what_it_is(wheel):
    with ZipFile(wheel) as files:
        names = set(files.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        facts = HeaderParser().parsestr(files.read(about).decode())
    shipped = {file.name for file in (ROOT / "configs").iterdir()}
    assert {Path(name).name for name in names if name.startswith("align_cluster/run_files/")} == shipped
    assert {"align_cluster/constraints/tested.txt", "align_cluster/constraints/oldest.txt"} <= names
    assert "align_cluster/py.typed" in names and any(name.endswith("/licenses/LICENSE") for name in names)
    assert facts["License-Expression"] == "Apache-2.0" and "Typing :: Typed" in facts.get_all("Classifier")
    assert not any(name.startswith(("tests/", "configs/", "benchmarks/")) for name in names)


def test_where_a_wheel_is_installed_the_quickstart_trains_by_name_and_is_copied_to_start_from(run):
    where = run("python", "-c", "import align_cluster; print(align_cluster.__file__)")
    assert Path(where).is_relative_to(run.home)
    assert "quickstart is valid: nft on embedded" in run("align-cluster", "validate", "quickstart")
    assert "align-cluster train mine.yaml" in run("align-cluster", "init", "--out", "mine.yaml")
    first = (run.home / "mine.yaml").read_text().splitlines()[0]
    assert first.endswith("$schema=run.schema.json") and (run.home / "run.schema.json").is_file()
    run("align-cluster", "train", "mine.yaml", "--set", *SMALL)
    assert (run.home / "runs" / "quickstart" / "report.html").is_file()
