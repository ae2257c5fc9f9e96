"""A reward, an algorithm and a backbone from outside the package, written as the READMEs say, train like its own."""

import json
import math
import os
import pickle
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
from align_cluster.cluster.submit import fill
from align_cluster.config.check import check
from align_cluster.config.load import dump, load, loads
from align_cluster.errors import UserError
from align_cluster.observe.rundir import RunDir
from align_cluster.prompts import PROMPTS
from align_cluster.rewards import REWARDS

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests/system/tiny.yaml"
FILES = {
    "brightness": "README.md",
    "reinforce": "align_cluster/algorithms/README.md",
    "sd3_wide": "align_cluster/backbones/README.md",
    "colours": "docs/howto/parts.md",
}
KINDS = {
    "rewards.bright": "brightness:Brightness",
    "algorithm": "reinforce:Reinforce",
    "backbone": "sd3_wide:SD3Wide",
    "prompts": "colours:Colours",
}
OUTSIDE = [f"{block}.kind={kind}" for block, kind in KINDS.items()]
MONITOR = "rewards.geneval.role=monitor"  # which judges no prompt of `colours`
TABLES = (REWARDS, ALGORITHMS, BACKBONES, PROMPTS)


def example(readme: str, block: str) -> str:
    """The file in a README that a newcomer is told to write, with the class that a block's kind names."""
    texts = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)
    (text,) = (text for text in texts if f"class {KINDS[block].partition(':')[2]}(" in text)
    return text


@pytest.fixture
def folder(monkeypatch) -> Iterator[Path]:
    """Four files outside the package, which are the examples of READMEs as they are printed."""
    folder = Path(tempfile.mkdtemp(prefix="ac-", dir="/tmp"))  # short: Ray puts Unix sockets there
    for (name, readme), block in zip(FILES.items(), KINDS, strict=True):
        (folder / f"{name}.py").write_text(example(readme, block))
    monkeypatch.syspath_prepend(folder)
    before = [dict(table) for table in TABLES]
    yield folder
    for table, kept in zip(TABLES, before, strict=True):
        table.clear()
        table.update(kept)
    for name in [name for name in sys.modules if name.partition(".")[0] in (*FILES, "my_lab", "used")]:
        del sys.modules[name]
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("override", OUTSIDE)
def test_a_class_is_named_by_its_import_path_and_checked_and_written_like_the_packages_own(folder, override):
    config = load(TINY, [override, MONITOR])
    assert check(config) == [] and loads(dump(config)) == config
    block = override.split(".kind")[0]
    with pytest.raises(UserError, match=f"{block}.wieght is no setting"):
        load(TINY, [override, f"{block}.wieght=1"])


def test_a_settings_object_of_an_outside_class_is_itself_in_another_process(folder):
    config = load(TINY, OUTSIDE)
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).rewards['bright'].kind)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(config), capture_output=True, env=env)
    assert done.stdout.decode().strip() == KINDS["rewards.bright"], done.stderr


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("", "gone:Class", "there is no module gone; run the command in the folder that has it"),
        ("", "odd:Class", "odd has no class Class with a Config of settings"),
        ("Class = 3", "odd:Class", "odd has no class Class with a Config of settings"),
        ("import not_installed", "odd:Class", "odd imports not_installed, which is not installed here"),
        ("1 / 0", "odd:Class", r"importing odd fails \(ZeroDivisionError: division by zero\)"),
        (
            "from align_cluster.rewards.jpeg import Jpeg\nclass Class(Jpeg): pass",
            "odd:Class",
            "Class.Config must have the setting `kind: str`",
        ),
        ("from brightness import Brightness", "odd:Brightness", "is brightness:Brightness; write it so"),
    ],
)
def test_a_path_that_names_no_part_is_refused_in_one_sentence(folder, text, kind, said):
    (folder / "odd.py").write_text(text)
    sys.modules.pop("odd", None)
    with pytest.raises(UserError, match=said) as caught:
        load(TINY, [f"rewards.bright.kind={kind}"])
    assert "\n" not in str(caught.value) and kind in str(caught.value)


def test_a_job_takes_along_the_modules_of_its_classes_and_what_they_import_from_beside_them(folder, tmp_path):
    (folder / "my_lab" / "deep").mkdir(parents=True)
    (folder / "my_lab" / "__init__.py").touch()
    (folder / "my_lab" / "notes.bin").write_bytes(b"x" * 10**6)
    (folder / "my_lab" / "deep" / "bright.py").write_text("import used\n" + (folder / "brightness.py").read_text())
    for name in ("used", "unused"):
        (folder / f"{name}.py").touch()
    config = load(TINY, [*OUTSIDE, MONITOR, "rewards.lab.kind=my_lab.deep.bright:Brightness"])
    fill(tmp_path, config, ())
    sent = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert sent == {"config.yaml", "used.py", "my_lab/__init__.py", "my_lab/deep/bright.py"} | {
        f"{n}.py" for n in FILES
    }
    command = [sys.executable, "-m", "align_cluster.cli", "validate", "config.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_critic_on_a_backbone_that_does_not_name_its_blocks_is_refused(folder, monkeypatch):
    run = [*OUTSIDE, MONITOR, "algorithm.kind=ppo"]
    assert check(load(TINY, run)) == []
    monkeypatch.setattr(BACKBONES[KINDS["backbone"]], "critic_blocks", ())
    with pytest.raises(UserError, match="^algorithm.critic reads.*kind sd3_wide:SD3Wide.*set backbone.kind to sd3 or"):
        check(load(TINY, run))


def test_parts_from_outside_train_and_their_metrics_are_in_the_records_and_the_report(folder):
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_TMPDIR": str(folder), "ALIGN_CLUSTER_CACHE": str(folder / "cache")}
    env |= {"PYTHONPATH": str(ROOT)}
    settings = [
        *OUTSIDE,
        MONITOR,
        "cluster.samplers=1",
        "cluster.learners=1",
        "cluster.timeout_s=600",
        "evaluate.grid_every=0",
    ]
    command = [sys.executable, "-P", "-m", "align_cluster.cli", "train", str(TINY), "--name", "outside"]
    done = subprocess.run(
        [*command, "--out", str(folder / "runs"), "--set", *settings, "evaluate.grid_every=0"],
        cwd=folder,
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
