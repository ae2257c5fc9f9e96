"""The doctor's look at a cluster that this process has joined: what is on its nodes, and whether a run fits."""

import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from align_cluster import __version__
from align_cluster.cluster.checks import GIB, Finding
from align_cluster.cluster.errors import reason
from align_cluster.cluster.placement import reserve, resources
from align_cluster.config.plan import derive
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError

PATIENCE_S = 60.0  # for a node's answer, which starts a process there
DECIDE_RESULTS = ("align_cluster", "torch", "ray")  # other versions than here are an error, those of the rest a warning
LEAST_STORE = 0.25  # GiB
FULLEST_DISK = 0.95  # where Ray stops spilling objects
SKEW_S = 5.0


def probe() -> dict[str, Any]:
    """Facts of the node that this runs on."""
    disk = shutil.disk_usage(ray._private.worker._global_node.get_session_dir_path())
    return {
        "host": platform.node(),
        "versions": software() | {"python": platform.python_version()},
        "disk": (disk.used / disk.total, disk.free),
        "time": time.time(),
        "load": os.getloadavg()[0],
    }


def nodes() -> Iterator[Finding]:
    """Every node: alive, with the software that this process has, room for objects, and a clock like this one's."""
    known = ray.nodes()
    alive = [node for node in known if node["Alive"]]
    if len(alive) < len(known):
        gone = ", ".join(node["NodeManagerAddress"] for node in known if not node["Alive"])
        yield Finding("warn", "nodes", f"{len(alive)} alive; lost: {gone}", "runs go on without them")
    task = ray.remote(probe)
    asked, asked_at = {}, time.time()
    for node in alive:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[node["NodeID"]] = task.options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote()
    here, until = software() | {"python": platform.python_version()}, time.monotonic() + PATIENCE_S
    for index, node in enumerate(alive):
        name = f"node {index} ({node['NodeManagerAddress']})"
        try:
            facts = ray.get(asked[node["NodeID"]], timeout=max(0.1, until - time.monotonic()))
        except GetTimeoutError:
            yield Finding(
                "fail", name, f"no answer in {PATIENCE_S:g} s", "look at its raylet.out in Ray's session folder"
            )
        except (RayError, ImportError) as error:
            remedy = "install align_cluster there as here, or take the node out"
            yield Finding("fail", name, f"cannot run align_cluster: {reason(error)}", remedy)
        else:
            skew = facts["time"] - min(max(facts["time"], asked_at), time.time())  # it read its clock in between
            yield from judge(name, node, facts | {"skew": skew}, here)


def judge(name: str, node: dict[str, Any], facts: dict[str, Any], here: dict[str, str]) -> Iterator[Finding]:
    """What Ray and the node itself say of it, against the versions that this process has."""
    store, (used, free) = node["Resources"].get("object_store_memory", 0.0), facts["disk"]
    share = [f"{node['Resources'].get(kind, 0):g} {kind}" for kind in ("CPU", "GPU")]
    room = f"object store {store / GIB:.2f} GiB, disk {free / GIB:.0f} GiB free, load {facts['load']:.1f}"
    yield Finding("ok", name, f"{facts['host']}: {', '.join(share)}, {room}")
    other = {key: value for key, value in facts["versions"].items() if here.get(key) != value}
    if other:
        text = ", ".join(f"{key} {value} (here {here.get(key, 'none')})" for key, value in other.items())
        state = "fail" if other.keys() & set(DECIDE_RESULTS) else "warn"
        yield Finding(state, name, text, "install the same versions on all nodes: results depend on them")
    if store < LEAST_STORE * GIB:
        remedy = "images and weights wait there: start that node with a larger --object-store-memory"
        yield Finding("warn", name, f"object store of {store / GIB:.2f} GiB", remedy)
    if used > FULLEST_DISK:
        remedy = "Ray spills no objects above 95 %: free some, or start that node with another --temp-dir"
        yield Finding("warn", name, f"disk of Ray's folder is {100 * used:.0f} % full", remedy)
    if abs(facts["skew"]) > SKEW_S:
        yield Finding(
            "warn", name, f"its clock is {facts['skew']:+.0f} s off", "set it by NTP, or logs are hard to read"
        )


def fit(config: RunConfig) -> Finding:
    """Whether a run would get its share of the cluster now; it is given back at once."""
    name = f"run {config.name}"
    try:
        plan = derive(config, *resources())
        with reserve(plan):
            most = f" (up to {plan.most_samplers})" if plan.most_samplers > plan.samplers else ""
            pools = f"{plan.samplers} samplers{most}, {plan.learners} learners, {plan.reward_workers} reward workers"
            return Finding("ok", name, f"fits: {pools}")
    except UserError as error:
        return Finding("fail", name, str(error))


def software() -> dict[str, str]:
    """Versions of what decides a result."""
    versions = {"align_cluster": __version__}
    for package in ("torch", "ray", "deepspeed", "diffusers", "transformers", "peft", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
