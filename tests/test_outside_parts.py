"""A reward, an algorithm and a backbone from outside the package, written as the READMEs say, train like its own."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from align_cluster.algorithms import ALGORITHMS
from align_cluster.backbones import BACKBONES
from align_cluster.config.check import check
from align_cluster.config.load import dump, load, loads
from align_cluster.errors import UserError
from align_cluster.observe.rundir import RunDir
from align_cluster.rewards import REWARDS

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests/system/tiny.yaml"
FILES = {
    "brightness": "README.md",
    "reinforce": "align_cluster/algorithms/README.md",
    "sd3_wide": "align_cluster/backbones/README.md",
}
OUTSIDE = ["rewards.bright.kind=brightness", "algorithm.kind=reinforce", "backbone.kind=sd3_wide"]


def example(readme: str, start: str) -> str:
    """The file in a README that a newcomer is told to write; it begins with `start`."""
    texts = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)
    (text,) = (text for text in texts if text.startswith(start))
    return text


def outside(name: str) -> str:
    """The text of a file outside the package, which is the example of a README as it is printed."""
    return example(FILES[name], "from typing")


@pytest.fixture
def registered() -> Iterator[None]:
    """The three parts in the dicts of this process, as long as the test lasts."""
    tables = [(table, dict(table)) for table in (REWARDS, ALGORITHMS, BACKBONES)]
    for name in FILES:
        exec(compile(outside(name), name, "exec"), {"__name__": name})
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Three files outside the package, and the script that runs the command line with them."""
    folder = Path(tempfile.mkdtemp(prefix="ac-", dir="/tmp"))  # short: Ray puts Unix sockets there
    for name in FILES:
        (folder / f"{name}.py").write_text(outside(name))
    (folder / "command.py").write_text(example("docs/howto/parts.md", "import brightness"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("override", OUTSIDE)
def test_a_part_is_a_choice_of_run_files_from_its_registration_on(override):
    with pytest.raises(UserError, match="it must be one of"):
        load(TINY, [override])


@pytest.mark.parametrize("override", OUTSIDE)
def test_a_registered_part_is_checked_and_written_like_the_packages_own(registered, override):
    config = load(TINY, [override])
    assert check(config) == [] and loads(dump(config)) == config
    block = override.split(".kind")[0]
    with pytest.raises(UserError, match=f"{block}.wieght is no setting"):
        load(TINY, [override, f"{block}.wieght=1"])


def test_a_critic_on_a_backbone_that_does_not_name_its_blocks_is_refused(registered, monkeypatch):
    run = [*OUTSIDE, "algorithm.kind=ppo"]
    assert check(load(TINY, run)) == []
    monkeypatch.setattr(BACKBONES["sd3_wide"], "critic_blocks", ())
    with pytest.raises(UserError, match="^algorithm.critic reads.*backbone.kind sd3_wide.*set backbone.kind to sd3 or"):
        check(load(TINY, run))


def test_parts_from_outside_train_and_their_metrics_are_in_the_records_and_the_report(folder):
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_TMPDIR": str(folder), "ALIGN_CLUSTER_CACHE": str(folder / "cache")}
    env |= {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    settings = [*OUTSIDE, "cluster.samplers=1", "cluster.learners=1", "cluster.timeout_s=600", "evaluate.grid_every=0"]
    command = [sys.executable, str(folder / "command.py"), "train", str(TINY), "--name", "outside"]
    done = subprocess.run(
        [*command, "--out", str(folder / "runs"), "--set", *settings],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (folder / "runs").iterdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row[name]) for row in rows for name in ("train/log_prob", "reward/bright/mean"))
    (lora,) = RunDir(run).lora.glob("*.safetensors")
    assert b"ff.net.2" in lora.read_bytes(), "the backbone's own targets are trained"
    report = (run / "report.html").read_text()
    for part in ("train/log_prob", "log-density of the drawn steps under the policy", "reward/bright"):
        assert part.lower() in report.lower()
