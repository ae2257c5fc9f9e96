"""`align-cluster doctor`: is this machine ready, and if not, what to do."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_cluster.cluster.checks import Finding, size
from align_cluster.errors import UserError

if TYPE_CHECKING:
    from align_cluster.config.run import RunConfig

REQUIRED = ("torch", "ray", "diffusers", "transformers", "peft", "accelerate", "deepspeed", "pydantic", "safetensors")
OPTIONAL = {  # the extra that brings a package, and what for
    "rapidocr": ("rewards", "the reward ocr"),
    "onnxruntime": ("rewards", "the reward ocr"),
    "open_clip_torch": ("rewards", "the rewards hps and open_clip_score, and geneval's colours in photographs"),
    "scipy": ("rewards", "geneval's detector mask2former"),
    "fastapi": ("serve", "reward services"),
}


def examine(address: str | None = None, quick: bool = False, config: "RunConfig | None" = None) -> list[Finding]:
    """All checks; the slow ones (a cluster's answer, a weight sync) come last.

    With `address` they are made of that cluster too: its nodes, whether a run with `config` would get its share of it,
    and a weight sync to a sampler on every node instead of one through a Ray of this machine.
    """
    findings = [*packages(), *machine(), ray_settings(), torchvision(), pipeline()]
    joined = address if address and not address.startswith(("http://", "https://")) else None
    if address and not joined:
        findings.append(dashboard(address))
    if joined:
        findings += reach(joined, config)
    if not quick and all(finding.state != "fail" for finding in findings if finding.name.startswith("cluster")):
        findings.append(sync(joined))
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
    yield size("memory", memory, 4, "samplers and learners of the embedded model need about 1 GiB each")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding("ok", "GPUs", ", ".join(names) or "none, everything runs on the CPU")
    yield size("free disk", shutil.disk_usage(Path.cwd()).free, 2, "runs and Ray's logs need room")
    if Path("/dev/shm").exists():
        yield size(
            "/dev/shm",
            shutil.disk_usage("/dev/shm").free,
            0.5,
            "Ray's object store lives there: docker run --shm-size=2g",
        )


def ray_settings() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode == "disabled":
        remedy = "whoever reaches a Ray's ports can run code in it: use token, or keep it on 127.0.0.1"
        return Finding("warn", "RAY_AUTH_MODE", mode, remedy)
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


def dashboard(address: str) -> Finding:
    """Whether a dashboard answers, which jobs are submitted to."""
    from align_cluster.cluster.submit import connect

    try:
        return Finding("ok", f"cluster {address}", f"answers, {len(connect(address).list_jobs())} jobs so far")
    except UserError as error:
        return Finding("fail", f"cluster {address}", str(error), "correct --address")


def reach(address: str, config: "RunConfig | None" = None) -> list[Finding]:
    """The cluster at `address` and its nodes."""
    from align_cluster.cluster.nodes import fit, nodes
    from align_cluster.cluster.placement import cluster, resources
    from align_cluster.config.run import ClusterConfig

    try:
        with cluster(ClusterConfig(address=address)):
            cores, gpus = resources()
            found = [Finding("ok", f"cluster {address}", f"{cores} cores, {gpus} GPUs"), *nodes()]
            return [*found, fit(config)] if config else found
    except UserError as error:
        return [Finding("fail", f"cluster {address}", str(error), "correct --address")]


def sync(address: str | None = None) -> Finding:
    try:
        result = sync_round_trip(address)
    except Exception as error:  # whatever is wrong with Ray here is what the user wants to read
        return Finding(
            "fail", "weight sync", f"{type(error).__name__}: {error}", "start with Ray's own log in /tmp/ray"
        )
    nodes = "1 node" if result["samplers"] == 1 else f"{result['samplers']} nodes"
    return Finding(
        "ok",
        "weight sync",
        f"{result['bytes'] / 1e6:.1f} MB to samplers on {nodes} in {1000 * result['seconds']:.0f} ms, "
        f"{result['tensors']} tensors bound, checksum {result['checksum'][:8]} proven",
    )


def sync_round_trip(address: str | None = None) -> dict[str, Any]:
    """Publish a random LoRA of the embedded model to a sampler actor on every node of the cluster at `address`, or in a
    Ray of its own, and prove that it arrived.

    Returns samplers, bytes, tensors, seconds (buffer to the last receipt) and checksum. RuntimeError where the proof
    fails.
    """
    import numpy as np
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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
    with cluster(ClusterConfig(address=address)):
        places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
        actor = ray.remote(Sampler)
        samplers = [actor.options(num_cpus=0, scheduling_strategy=place).remote(config) for place in places]
        seconds = 0.0
        for _ in range(2):  # the first time, they load the model
            started = time.perf_counter()
            reference = ray.put(buffer)
            receipts = ray.get([one.adopt.remote(manifest, reference) for one in samplers], timeout=120)
            seconds = time.perf_counter() - started
        check(manifest, receipts, expected=len(samplers))
        for one in samplers:
            ray.kill(one)
    first = receipts[0]
    return {
        "samplers": len(samplers),
        "bytes": manifest.nbytes,
        "tensors": first.bound,
        "seconds": seconds,
        "checksum": first.checksum,
    }
