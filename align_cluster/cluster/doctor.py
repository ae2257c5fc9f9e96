"""`align-cluster doctor`: is this machine, or a cluster, ready for a run, and if not, what to do.

The checks of this machine are in `checks.py`, those of a cluster's nodes in `nodes.py`, and those of a run that
works or has ended in `run_status.py`. This file puts them together and tries a weight sync.
"""

import time
from typing import TYPE_CHECKING

from align_cluster.cluster.checks import Check, this_machine
from align_cluster.errors import UserError, counted

if TYPE_CHECKING:
    from align_cluster.config.run import RunConfig


def examine(address: str | None = None, quick: bool = False, config: "RunConfig | None" = None) -> list[Check]:
    """Make all checks; the slow ones (a cluster's answer, a weight sync) come last.

    `address` adds checks of that cluster: its nodes, whether a run with `config` would get its share of it, and a
    weight sync to a sampler on every node instead of one through a Ray of this machine. The URL of a dashboard is only
    asked for its jobs and its nodes, and so `config` is only compared with what they have. `quick` leaves the weight
    sync out.
    """
    checks = list(this_machine())
    if address and address.startswith(("http://", "https://")):
        checks += dashboard(address, config)
        address = None
    elif address:
        checks += reach(address, config)
    reached = all(check.state != "fail" for check in checks if check.name.startswith("cluster"))
    if reached and not quick:
        checks.append(sync(address))
    return checks


def dashboard(address: str, config: "RunConfig | None" = None) -> list[Check]:
    """Check that a dashboard, to which jobs are submitted, answers, and that its nodes have what a run needs."""
    from align_cluster.cluster.jobs import connect

    try:
        client = connect(address)
        found = [Check("ok", f"cluster {address}", f"answers, {counted(len(client.list_jobs()), 'job')} so far")]
        if config:
            from align_cluster.cluster.nodes import fit_on, listed

            found.append(fit_on(listed(client.get_address()), config))
        return found
    except UserError as error:
        return [Check("fail", f"cluster {address}", str(error), "correct --address")]


def reach(address: str, config: "RunConfig | None" = None) -> list[Check]:
    """Check that the cluster at `address` answers, then its nodes, and that a run with `config` fits."""
    from align_cluster.cluster.nodes import fit, nodes
    from align_cluster.cluster.placement import cluster, resources
    from align_cluster.config.run import ClusterConfig

    try:
        whole = ClusterConfig(address=address)
        with cluster(whole):
            cores, gpus = resources(whole)
            found = [Check("ok", f"cluster {address}", f"{cores} cores, {gpus} GPUs"), *nodes()]
            return [*found, fit(config)] if config else found
    except UserError as error:
        return [Check("fail", f"cluster {address}", str(error), "correct --address")]


def sync(address: str | None = None) -> Check:
    """Check that published weights arrive at a sampler on every node, or in a Ray of this machine."""
    try:
        return Check("ok", "weight sync", sync_round_trip(address))
    except Exception as error:  # whatever is wrong with Ray here is what the user wants to read
        return Check("fail", "weight sync", f"{type(error).__name__}: {error}", "start with Ray's own log in /tmp/ray")


def sync_round_trip(address: str | None = None) -> str:
    """Publish a random LoRA of the embedded model to samplers, and prove by their receipts that it arrived.

    A sampler starts on every node of the cluster at `address`, or in a Ray of its own. Returns a sentence with the size
    and the time from the buffer to the last receipt. RuntimeError where a receipt is wrong.
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
        for _ in range(2):  # the first round waits for samplers that load the model; the second one's time is reported
            started = time.perf_counter()
            reference = ray.put(buffer)
            receipts = ray.get([one.adopt.remote(manifest, reference) for one in samplers], timeout=120)
            spent = time.perf_counter() - started
        check(manifest, receipts, expected=len(samplers))
        for one in samplers:
            ray.kill(one)
    return (
        f"{manifest.nbytes / 1e6:.1f} MB to samplers on {counted(len(samplers), 'node')} in "
        f"{1000 * spent:.0f} ms, {receipts[0].bound} tensors bound, checksum {receipts[0].checksum[:8]} proven"
    )
