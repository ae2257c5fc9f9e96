"""`align-cluster doctor`: is this machine ready, and if not, what to do."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from align_cluster.types import UserError

REQUIRED = ("torch", "ray", "diffusers", "transformers", "peft", "accelerate", "deepspeed", "pydantic", "safetensors")
OPTIONAL = {  # the extra that brings a package, and what for
    "rapidocr": ("rewards", "the reward ocr"),
    "onnxruntime": ("rewards", "the reward ocr"),
    "open_clip_torch": ("rewards", "the rewards hps and open_clip_score, and geneval's colours in photographs"),
    "scipy": ("rewards", "geneval's detector mask2former"),
    "fastapi": ("serve", "reward services"),
}
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report. `fail` makes the command exit with 1; `remedy` says what to do."""

    state: Literal["ok", "warn", "fail"]
    name: str
    value: str
    remedy: str = ""


def examine(address: str | None = None, quick: bool = False) -> list[Finding]:
    """All checks; the slow ones (a cluster's answer, a weight sync through a local Ray) come last."""
    findings = [*packages(), *machine(), ray_settings(), torchvision(), pipeline()]
    if address:
        findings.append(reach(address))
    if not quick:
        findings.append(sync())
    return findings


def packages() -> Iterator[Finding]:
    supported = sys.version_info >= (3, 10)
    yield Finding(
        "ok" if supported else "fail", "python", platform.python_version(), "" if supported else "use 3.10 or newer"
    )
    for name in REQUIRED:
        version = _version(name)
        yield Finding("ok", name, version) if version else Finding("fail", name, "missing", "pip install align-cluster")
    for name, (extra, purpose) in OPTIONAL.items():
        version = _version(name)
        remedy = f"for {purpose}: pip install 'align-cluster[{extra}]'"
        yield Finding("ok", name, version) if version else Finding("warn", name, "not installed", remedy)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> Iterator[Finding]:
    import torch

    yield Finding("ok", "cores", str(os.cpu_count()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield _size("memory", memory, 4, "samplers and learners of the embedded model need about 1 GiB each")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding("ok", "GPUs", ", ".join(names) or "none, everything runs on the CPU")
    yield _size("free disk", shutil.disk_usage(Path.cwd()).free, 2, "runs and Ray's logs need room")
    if Path("/dev/shm").exists():
        yield _size(
            "/dev/shm",
            shutil.disk_usage("/dev/shm").free,
            0.5,
            "Ray's object store lives there: docker run --shm-size=2g",
        )


def _size(name: str, count: float, least: float, remedy: str) -> Finding:
    enough = count >= least * GIB
    return Finding("ok" if enough else "warn", name, f"{count / GIB:.1f} GiB", "" if enough else remedy)


def ray_settings() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE")
    token = "there" if (Path.home() / ".ray" / "auth_token").exists() else "not there yet"
    return Finding(
        "ok", "RAY_AUTH_MODE", f"{mode or 'not set (a private Ray uses tokens)'}, ~/.ray/auth_token is {token}"
    )


def torchvision() -> Finding:
    """torchvision wheels are CUDA builds; with another torch their operators do not load, and transformers
    would break without this package's guard."""
    version = _version("torchvision")
    if not version:
        return Finding("ok", "torchvision", "not installed, and only open_clip needs it")
    command = [sys.executable, "-c", "import align_cluster, torchvision"]
    if not subprocess.run(command, capture_output=True, text=True).returncode:
        return Finding("ok", "torchvision", f"{version}, importable beside this torch")
    remedy = "pip uninstall torchvision, or install the build that belongs to this torch"
    return Finding("fail", "torchvision", f"{version}, whose operators do not load with this torch", remedy)


def pipeline() -> Finding:
    from align_cluster.embedded import pipeline_path

    path = pipeline_path()
    if not (path / "model_index.json").exists():
        return Finding(
            "fail", "embedded model", f"no pipeline in {path}", "reinstall align-cluster with its package data"
        )
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Finding("ok", "embedded model", f"{size / 1e6:.1f} MB in {path}")


def reach(address: str) -> Finding:
    """Whether a cluster answers: a dashboard URL is asked for its jobs, another address is joined."""
    from align_cluster.cluster.placement import cluster, resources
    from align_cluster.cluster.submit import connect
    from align_cluster.config.run import ClusterConfig

    try:
        if address.startswith(("http://", "https://")):
            return Finding("ok", f"cluster {address}", f"answers, {len(connect(address).list_jobs())} jobs so far")
        with cluster(ClusterConfig(address=address)):
            cores, gpus = resources()
        return Finding("ok", f"cluster {address}", f"{cores} cores, {gpus} GPUs")
    except UserError as error:
        return Finding("fail", f"cluster {address}", str(error), "correct --address")


def sync() -> Finding:
    try:
        result = sync_round_trip()
    except Exception as error:  # whatever is wrong with Ray here is what the user wants to read
        return Finding(
            "fail", "weight sync", f"{type(error).__name__}: {error}", "start with Ray's own log in /tmp/ray"
        )
    return Finding(
        "ok",
        "weight sync",
        f"{result['bytes'] / 1e6:.1f} MB to a sampler in {1000 * result['seconds']:.0f} ms, "
        f"{result['tensors']} tensors bound, checksum {result['checksum'][:8]} proven",
    )


def sync_round_trip() -> dict[str, Any]:
    """Publish a random LoRA of the embedded model to a sampler actor in a Ray of its own, and prove that it arrived.

    Returns bytes, tensors, seconds (buffer to receipt) and checksum. RuntimeError where the proof fails.
    """
    import numpy as np
    import ray

    from align_cluster.backbones.adapters import adapter_parameters
    from align_cluster.backbones.sd3 import SD3
    from align_cluster.cluster.placement import cluster
    from align_cluster.config.run import ClusterConfig
    from align_cluster.rollouts.sampler import Sampler
    from align_cluster.weights import check, publish

    config, rng = SD3.Config(), np.random.default_rng(0)
    parameters = adapter_parameters(Sampler(config).denoiser, "default")
    state = {name: rng.standard_normal(tuple(p.shape), dtype=np.float32) for name, p in parameters.items()}
    manifest, buffer = publish(state, version=1)
    with cluster(ClusterConfig()):
        sampler = ray.remote(Sampler).options(num_cpus=1).remote(config)
        ray.get(sampler.adopt.remote(manifest, ray.put(buffer)), timeout=120)  # loads the model
        started = time.perf_counter()
        receipt = ray.get(sampler.adopt.remote(manifest, ray.put(buffer)), timeout=60)
        seconds = time.perf_counter() - started
        check(manifest, [receipt], expected=1)
        ray.kill(sampler)
    return {"bytes": manifest.nbytes, "tensors": receipt.bound, "seconds": seconds, "checksum": receipt.checksum}


def render(findings: list[Finding], as_json: bool = False) -> str:
    """The report as text, one finding a line with its remedy below, or as JSON."""
    if as_json:
        return json.dumps([asdict(finding) for finding in findings], indent=2)
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<5} {finding.name:<{width}}  {finding.value}")
        if finding.remedy:
            lines.append(f"{'':<5} {'':<{width}}  -> {finding.remedy}")
    failed = sum(finding.state == "fail" for finding in findings)
    lines.append(f"{failed} problems" if failed else "ready")
    return "\n".join(lines)
