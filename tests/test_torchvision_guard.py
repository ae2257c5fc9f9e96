"""Operators are registered for a whole process, so every case has one of its own."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from align_cluster.torchvision_guard import TorchvisionGuard

ROOT = Path(__file__).parents[1]
GUARDED = "from align_cluster import torchvision_guard as guard; guard.install(); "

# What torchvision does at import; the operators themselves come from a compiled library.
DESCRIBES = """
import torch
print("executed")
{loads}
for name in ("nms", "qnms"):
    torch.library.register_fake("torchvision::" + name)(lambda dets, scores, iou_threshold: dets.new_empty(1))
"""
LOADS = """
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl(name, lambda dets, scores, iou_threshold: scores, "CPU")
"""
USES = "import torch; print(torch.ops.torchvision.nms(torch.zeros(1, 4), torch.ones(1), 0.5).tolist())"


def python(code, *paths):
    """A fresh interpreter's result; `paths` come before the installed packages."""
    command = f"import sys; sys.path[:0] = {[str(path) for path in (*paths, ROOT)]!r}\n{code}"
    return subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=120)


@pytest.fixture
def package(tmp_path):
    """Writes a package called torchvision with this source, and gives the folder to import it from."""

    def write(source):
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(source)
        return tmp_path

    return write


def test_where_the_operators_do_not_load_torchvision_imports_all_the_same(package):
    broken = package(DESCRIBES.format(loads=""))
    code = GUARDED + "import torchvision; print(len(guard.declared))\n" + USES
    result = python(code, broken)
    assert result.stdout.split() == ["executed", "executed", "1"]
    assert "torchvision::nms" in result.stderr and "NotImplementedError" in result.stderr  # declared, not stood in for


def test_without_the_guard_it_does_not(package):
    result = python("import torchvision", package(DESCRIBES.format(loads="")))
    assert "operator torchvision::nms does not exist" in result.stderr


def test_where_the_operators_load_nothing_changes(package):
    working = package(DESCRIBES.format(loads=LOADS))
    result = python(GUARDED + "import torchvision; print(len(guard.declared))\n" + USES, working)
    assert result.stdout.split() == ["executed", "0", "[1.0]"], result.stderr


def test_other_errors_of_torchvision_rise(package):
    result = python(GUARDED + "import torchvision", package("raise RuntimeError('made for another torch')"))
    assert "RuntimeError: made for another torch" in result.stderr


def test_the_guard_itself_imports_nothing_heavy():
    result = python(GUARDED + "print({'torch', 'torchvision', 'numpy'} & set(sys.modules))")
    assert result.stdout.strip() == "set()", result.stderr


def test_only_torchvision_concerns_it_and_only_where_it_is(tmp_path):
    assert TorchvisionGuard().find_spec("torch", None) is None
    assert TorchvisionGuard().find_spec("torchvision", [str(tmp_path)]) is None


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="the extra 'rewards' is not installed")
def test_the_installed_torchvision_lives_beside_the_libraries_that_import_it():
    code = GUARDED + (
        "import open_clip, peft, torch, torchvision; from diffusers import StableDiffusion3Pipeline\n"
        "from transformers import CLIPImageProcessor; from torchvision.transforms import v2\n"
        "assert v2.Resize(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)\n"
        "assert bool(guard.declared) != torchvision.extension._has_ops()\n"
        "print('fine')"
    )
    result = python(code)
    assert result.stdout.strip().endswith("fine"), result.stderr
