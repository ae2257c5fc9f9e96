"""The doctor's checks of a cluster that this process has joined: what is on its nodes, and whether a run fits."""

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
from align_cluster.cluster.checks import GIB, Check
from align_cluster.cluster.errors import reason
from align_cluster.cluster.placement import reserve, resources, slots
from align_cluster.config.plan import Plan, derive
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError, counted

ANSWER_S = 60.0  # seconds for all nodes to answer, since each starts a process first
DECIDE_RESULTS = ("align_cluster", "torch", "ray")  # another version of these fails; of the other packages, it warns
LEAST_STORE = 0.25  # GiB of object store below which images and weights hardly fit
FULLEST_DISK = 0.95  # share of a disk from which on Ray stops spilling objects
MOST_NODES = 10_000  # that a dashboard lists; it refuses to be asked for more
SKEW_S = 5.0  # seconds between two clocks from which on logs are hard to put in order


def log_folder() -> str:
    """Return where this node's Ray keeps the logs of its workers; other nodes have a folder of the same name."""
    return ray._private.worker._global_node.get_logs_dir_path()


def software() -> dict[str, str]:
    """Return the versions of the packages that decide a run's result."""
    versions = {"align_cluster": __version__}
    for package in ("torch", "ray", "deepspeed", "diffusers", "transformers", "peft", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def probe() -> dict[str, Any]:
    """Return what Ray does not tell of the node that this runs on: versions, the disk of Ray's folder, clock, load."""
    disk = shutil.disk_usage(ray.get_runtime_context().get_temp_dir())
    return {
        "versions": software() | {"python": platform.python_version()},
        "disk": (disk.used / disk.total, disk.free),
        "time": time.time(),
        "load": os.getloadavg()[0],
    }


def nodes() -> Iterator[Check]:
    """Check every node: is it alive, with the software of this process, room for objects, and a clock like this one."""
    known = ray.nodes()
    alive = [node for node in known if node["Alive"]]
    if len(alive) < len(known):
        gone = ", ".join(node["NodeManagerAddress"] for node in known if not node["Alive"])
        yield Check("warn", "nodes", f"{len(alive)} alive; lost: {gone}", "runs go on without them")
    asked_at, until = time.time(), time.monotonic() + ANSWER_S
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in alive]
    task = ray.remote(num_cpus=0, max_retries=0)(probe)
    answers = [task.options(scheduling_strategy=place).remote() for place in places]
    here = software() | {"python": platform.python_version()}
    for index, (node, answer) in enumerate(zip(alive, answers, strict=True)):
        name = f"node {index} ({node['NodeManagerAddress']})"
        try:
            facts = ray.get(answer, timeout=max(0.1, until - time.monotonic()))
        except GetTimeoutError:
            remedy = "look at its raylet.out in Ray's session folder"
            yield Check("fail", name, f"no answer in {ANSWER_S:g} s", remedy)
        except (RayError, ImportError) as error:
            remedy = "install align_cluster there as here, or take the node out"
            yield Check("fail", name, f"cannot run align_cluster: {reason(error)}", remedy)
        else:
            # The node read its clock between asking and now: only what lies outside of that is a difference.
            skew = facts["time"] - min(max(facts["time"], asked_at), time.time())
            yield from node_checks(name, node, facts | {"skew": skew}, here)


def node_checks(name: str, node: dict[str, Any], facts: dict[str, Any], here: dict[str, str]) -> Iterator[Check]:
    """Check one node.

    `node` is its entry in `ray.nodes()`, `facts` what `probe` found there, with the skew of its clock in seconds, and
    `here` are the versions of this process.
    """
    store, (used, free) = node["Resources"].get("object_store_memory", 0.0), facts["disk"]
    share = [f"{node['Resources'].get(kind, 0):g} {kind}" for kind in ("CPU", "GPU")]
    room = f"object store {store / GIB:.2f} GiB, disk {free / GIB:.0f} GiB free, load {facts['load']:.1f}"
    yield Check("ok", name, f"{node['NodeManagerHostname']}: {', '.join(share)}, {room}")
    other = {key: value for key, value in facts["versions"].items() if here.get(key) != value}
    if other:
        text = ", ".join(f"{key} {value} (here {here.get(key, 'none')})" for key, value in other.items())
        state = "fail" if other.keys() & set(DECIDE_RESULTS) else "warn"
        yield Check(state, name, text, "install the same versions on all nodes: results depend on them")
    if store < LEAST_STORE * GIB:
        remedy = "images and weights wait there: start that node with a larger --object-store-memory"
        yield Check("warn", name, f"object store of {store / GIB:.2f} GiB", remedy)
    if used > FULLEST_DISK:
        remedy = "Ray spills no objects above 95 %: free some, or start that node with another --temp-dir"
        yield Check("warn", name, f"disk of Ray's folder is {100 * used:.0f} % full", remedy)
    if abs(facts["skew"]) > SKEW_S:
        remedy = "set it by NTP, or logs are hard to read"
        yield Check("warn", name, f"its clock is {facts['skew']:+.0f} s off", remedy)


def fit(config: RunConfig) -> Check:
    """Check that a run would get its share of the cluster now; the share is given back at once."""
    name = f"run {config.name}"
    try:
        plan = derive(config, *resources(config.cluster))
        with reserve(plan):
            return Check("ok", name, f"fits: {_pools(plan)}")
    except UserError as error:
        return Check("fail", name, str(error))


def _pools(plan: Plan) -> str:
    most = f" (up to {plan.most_samplers})" if plan.most_samplers > plan.samplers else ""
    return f"{plan.samplers} samplers{most}, {plan.learners} learners, {plan.reward_workers} reward workers"


def listed(dashboard: str) -> list[dict[str, float]]:
    """Return the resources of every node that is alive, as a cluster's dashboard lists them.

    Raises UserError where it does not.
    """
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        return [node.resources_total for node in list_nodes(dashboard, limit=MOST_NODES) if node.state == "ALIVE"]
    except RayStateApiException as error:
        raise UserError(f"{dashboard} does not list its nodes ({reason(error)}); look at its dashboard") from error


def fit_on(nodes: list[dict[str, float]], config: RunConfig) -> Check:
    """Check that a run would fit on nodes with these resources if nobody else used them."""
    name = f"run {config.name}"
    cores, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    try:
        plan = derive(config, cores, gpus)  # which shares out what all of them have together
    except UserError as error:
        return Check("fail", name, str(error))
    for bundle in slots(plan)[0]:
        if not any(all(node.get(kind, 0) >= count - 1e-6 for kind, count in bundle.items()) for node in nodes):
            wanted = " and ".join(f"{count:g} {kind}" for kind, count in bundle.items())
            return Check("fail", name, f"no node has the {wanted} of one place for workers", "add larger nodes")
    return Check("ok", name, f"fits on {counted(len(nodes), 'idle node')}: {_pools(plan)}")
