"""The doctor's record of one check, its report as text, and the checks of this machine, which need no Ray."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from align_cluster.errors import counted
from align_cluster.machine import cores, memory

GIB = 2**30
BUSY = 4  # load for each core from which on Ray may not start within the half minute that it gives itself
TESTED_PYTHON = (3, 11)
VERSIONS = Path(__file__).parents[1] / "constraints"  # a link to the repository's folder; a wheel has the files
REQUIRED = ("torch", "ray", "diffusers", "transformers", "peft", "accelerate", "deepspeed", "pydantic", "safetensors")
UNTESTED = "results and errors may differ: pip install -c constraints/tested.txt -e ."
OPTIONAL = {  # package: the extra that brings it, and what needs it
    "rapidocr": ("rewards", "the reward ocr"),
    "onnxruntime": ("rewards", "the reward ocr"),
    "open_clip_torch": ("rewards", "the rewards hps and open_clip_score, and geneval's colours in photographs"),
    "scipy": ("rewards", "geneval's detector mask2former"),
    "fastapi": ("serve", "reward services"),
    "wandb": ("wandb", "the tracker wandb"),
    "mlflow": ("mlflow", "the tracker mlflow"),
}


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report. A `fail` makes the command exit with 1; `remedy` says what to do."""

    state: Literal["ok", "warn", "fail"]
    name: str
    value: str
    remedy: str = ""

    @classmethod
    def of(cls, good: bool, name: str, value: str, remedy: str, bad: Literal["warn", "fail"] = "warn") -> "Check":
        """Return an ok check if `good` holds, and else one in the state `bad` with its remedy."""
        return cls("ok", name, value) if good else cls(bad, name, value, remedy)


def render(checks: list[Check], as_json: bool = False) -> str:
    """Return the report: a line for each check with its remedy below, or JSON."""
    if as_json:
        return json.dumps([asdict(check) for check in checks], indent=2)
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<5} {check.name:<{width}}  {check.value}")
        if check.remedy:
            lines.append(f"{'':<5} {'':<{width}}  -> {check.remedy}")
    failed = sum(check.state == "fail" for check in checks)
    lines.append(counted(failed, "problem") if failed else "ready")
    return "\n".join(lines)


def this_machine() -> Iterator[Check]:
    """Check the software, the hardware and the settings of the machine that this process runs on."""
    yield from packages()
    yield from hardware()
    yield ray_settings()
    yield torchvision()
    yield embedded_model()


def packages() -> Iterator[Check]:
    """Check that Python and every package are there, in versions that were tested.

    A missing optional package is a warning that says what needs it.
    """
    yield Check.of(sys.version_info >= (3, 11), "python", platform.python_version(), "use 3.11 or newer", "fail")
    if sys.version_info[:2] > TESTED_PYTHON:
        tested = ".".join(map(str, TESTED_PYTHON))
        yield Check("warn", "python", f"{platform.python_version()} is newer than {tested}, which was tested", UNTESTED)
    notes = dict(untested())
    for name in REQUIRED:
        version = package_version(name)
        if note := notes.pop(name, ""):
            yield Check("warn", name, note, UNTESTED)
        else:
            yield Check.of(bool(version), name, version or "missing", "pip install align-cluster", "fail")
    for name, (extra, purpose) in OPTIONAL.items():
        version = package_version(name)
        if note := notes.pop(name, ""):
            yield Check("warn", name, note, UNTESTED)
        else:
            remedy = f"for {purpose}: pip install 'align-cluster[{extra}]'"
            yield Check.of(bool(version), name, version or "not installed", remedy)
    yield from (Check("warn", name, note, UNTESTED) for name, note in notes.items())


def untested() -> Iterator[tuple[str, str]]:
    """Yield each installed package that is older or newer than the versions that were tested, and a note about it."""
    oldest = pins("oldest")
    for name, newest in pins("tested").items():
        version, least = package_version(name), oldest.get(name, newest)
        if version and _release(version) > _release(newest):
            yield name, f"{version} is newer than {newest}, the newest that was tested"
        elif version and _release(version) < _release(least):
            yield name, f"{version} is older than {least}, the oldest that was tested"


def pins(which: Literal["tested", "oldest"]) -> dict[str, str]:
    """Return the versions of a file in constraints/ by package."""
    lines = (VERSIONS / f"{which}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: 2.13.0 and 2.13.0+cpu are the same."""
    return tuple(int(number) for number in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware() -> Iterator[Check]:
    """Check cores and their load, memory, GPUs, the disk under the working directory, and shared memory."""
    import torch

    def size(name: str, count: float, least: float, remedy: str) -> Check:
        return Check.of(count >= least * GIB, name, f"{count / GIB:.1f} GiB", remedy)

    load, remedy = os.getloadavg()[0], "Ray and workers start late, or not at all: wait until other jobs have ended"
    yield Check("ok", "cores", str(cores()))
    yield Check.of(load < BUSY * cores(), "load", f"{load:.1f}", remedy)
    yield size("memory", memory(), 4, "samplers and learners of the embedded model need about 1 GiB each")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Check("ok", "GPUs", ", ".join(names) or "none, everything runs on the CPU")
    yield size("free disk", shutil.disk_usage(Path.cwd()).free, 2, "runs and Ray's logs need room")
    if Path("/dev/shm").exists():
        remedy = "Ray's object store lives there: docker run --shm-size=2g"
        yield size("/dev/shm", shutil.disk_usage("/dev/shm").free, 0.5, remedy)


def token_file() -> Path:
    """Return the file that Ray reads its token from."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def token_problem() -> str | None:
    """Say why this process has no token for Ray, and what to do; None where it has one."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    file, cure = token_file(), "put the cluster's there, with chmod 600, or name its file by RAY_AUTH_TOKEN_PATH"
    try:
        return None if file.read_text(encoding="utf-8").strip() else f"{file} is empty; {cure}"
    except FileNotFoundError:
        return f"{file} is not there; {cure}"
    except (OSError, ValueError) as error:
        return f"{file} cannot be read ({error}); {cure}"


def ray_settings() -> Check:
    """Check that Ray authenticates whoever connects."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode == "disabled":
        remedy = "whoever reaches a Ray's ports can run code in it: use token, or keep it on 127.0.0.1"
        return Check("warn", "RAY_AUTH_MODE", mode, remedy)
    file = token_file()
    there = file.exists()
    if there and (problem := token_problem()):
        return Check("fail", "RAY_AUTH_MODE", *problem.split("; "))
    value = f"{mode or 'not set (a private Ray uses tokens)'}, {file} is {'there' if there else 'not there yet'}"
    closed = not there or not stat.S_IMODE(file.stat().st_mode) & 0o077
    return Check.of(closed, "RAY_AUTH_MODE", value, f"others can read it: chmod 600 {file}, as the next run does")


# torchvision as stock diffusers and transformers import it, and then as this package's guard lets it be imported.
IMPORT_TORCHVISION = """
try:
    import torchvision
except Exception:
    import align_cluster, torchvision
    print("mended")
"""


def torchvision() -> Check:
    """Check that torchvision loads beside this torch, also in programs without this package's guard.

    Its wheels are CUDA builds. With another torch their operators do not load, and neither does stock diffusers.
    """
    version = package_version("torchvision")
    if not version:
        return Check("ok", "torchvision", "not installed, and only open_clip needs it")
    done = subprocess.run([sys.executable, "-c", IMPORT_TORCHVISION], capture_output=True, text=True)
    if done.returncode == 0 and not done.stdout:
        return Check("ok", "torchvision", f"{version}, importable beside this torch")
    remedy = "pip uninstall torchvision, or install the build that belongs to this torch"
    text = f"{version}, whose operators do not load with this torch"
    if done.returncode == 0:
        text += ": align_cluster mends that in its own processes; plain diffusers cannot be imported"
    return Check("fail" if done.returncode else "warn", "torchvision", text, remedy)


def embedded_model() -> Check:
    """Check that the embedded pipeline came with the package."""
    from align_cluster.embedded import pipeline_path

    path = pipeline_path()
    if not (path / "model_index.json").exists():
        remedy = "reinstall align-cluster with its package data"
        return Check("fail", "embedded model", f"no pipeline in {path}", remedy)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Check("ok", "embedded model", f"{size / 1e6:.1f} MB in {path}")
