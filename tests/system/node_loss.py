"""Runs on a Ray of several nodes: quiet, with nodes that go down on the way while others join, and with one that joins
while a run waits for room. And what the doctor says of the nodes. Prints one JSON line.

    node_loss.py loss|ahead|join FOLDER PYTHON

`ahead` is `loss` with runs that draw one step ahead.

Needs a Ray of its own, and Ray reads how soon a node counts as lost from the environment: test_nodes.py starts it.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import ray
from ray.cluster_utils import Cluster

from align_cluster.cluster import doctor
from align_cluster.cluster.pool import Pool, stream
from align_cluster.config.load import load
from align_cluster.loop import driver

# isort: split
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package
from hooked import HookedWorkers  # noqa: E402

NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}
OVERRIDES = (
    "name=nodes",
    "algorithm.kind=grpo",
    "steps=3",
    "prompts_per_step=3",
    "cluster.timeout_s=300",
    "rollout.group_size=16",  # images and records of a chunk are then too large to travel beside the answer
    "rollout.chunk=16",  # three a step: there is work for a sampler more, and images on every node
    "rollout.steps=4",
    "cluster.learners=1",
    "evaluate.count=1",
    "evaluate.images_per_prompt=1",
    "evaluate.grid_every=0",
    "evaluate.grid_prompts=1",
    "evaluate.grid_columns=1",
)


class Observer(HookedWorkers):
    """Says what happens to nodes, at which moments of the run."""

    facts: dict = {"lost_images": 0, "redrawn": 0, "samplers": []}

    def __init__(self, *args):
        super().__init__(*args)
        self._redraw, self.rollouts.redraw = self.rollouts.redraw, self.redraw
        self._missed, self.rollouts._draw_again = self.rollouts._draw_again, self.draw_again

    def collect(self, drawing):
        answer = super().collect(drawing)
        self.facts["samplers"].append(len(self.samplers.ready_workers))
        return answer

    def redraw(self, drawn):
        self.facts["redrawn"] += len(drawn)
        self._redraw(drawn)

    def draw_again(self, missed, drawing):
        self.facts["lost_images"] += len(missed)
        self._missed(missed, drawing)


def saboteur(cluster: Cluster, extra: object) -> type[HookedWorkers]:
    class Saboteur(Observer):
        node = extra

        def other_node(self) -> None:
            cluster.remove_node(self.node, allow_graceful=False)
            type(self).node = cluster.add_node(**NODE)

        def begin(self, chunks, request):
            self.armed = chunks[0].step == 1
            return super().begin(chunks, request)

        def report(self, stage, done, total):
            super().report(stage, done, total)
            if self.armed and stage == "rollout" and done == total:  # the last images are not scored yet
                self.armed = False
                self.other_node()

        def update(self, step, drawn, credit):
            if step == 2 - self.plan.config.loop.ahead:  # one step ahead, the next one is drawn meanwhile
                self.other_node()
                time.sleep(5)  # until Ray knows; an update that is quicker finds the records still there
            return super().update(step, drawn, credit)

    return Saboteur


def newcomer(cluster: Cluster) -> type[HookedWorkers]:
    """Workers for whom a node joins after the first step, which has asked for a sampler more than there is room for."""

    class Newcomer(Observer):
        def begin(self, chunks, request):
            if chunks[0].step == 1:
                cluster.add_node(**NODE)
                self.samplers.wait_until(lambda: len(self.samplers.ready_workers) == self.samplers.max_size)
            return super().begin(chunks, request)

    return Newcomer


class Hand:
    """Makes and looks at objects."""

    def make(self) -> tuple[str, np.ndarray]:
        return "made", np.ones(10**6, np.uint8)

    def look(self, array: np.ndarray) -> int:
        return int(array.sum())


def lost_input(cluster: Cluster) -> str:
    """What comes of a call whose argument went down with the node that it was made on."""
    node = cluster.add_node(**NODE, resources={"new": 1})
    maker = Pool(
        "maker", lambda name, index: ray.remote(Hand).options(num_cpus=0, resources={"new": 1}).remote(), 1, 120
    )
    looker = Pool("looker", lambda name, index: ray.remote(Hand).options(num_cpus=0).remote(), 1, 120)
    looker.wait_until(lambda: len(looker.ready_workers) == looker.size)
    maker.submit(0, "make", returns=2)
    (made,) = stream(maker)
    cluster.remove_node(node, allow_graceful=False)
    while any(one["NodeID"] == node.node_id and one["Alive"] for one in ray.nodes()):
        time.sleep(0.5)
    looker.submit(0, "look", made.refs[0])
    (done,) = stream(looker)
    for pool in (maker, looker):
        pool.shutdown()
    return type(done.value).__name__


def run(folder: Path, crew: type[HookedWorkers], overrides: tuple[str, ...]) -> dict:
    """One run, and what was seen of it."""
    Observer.facts = {"lost_images": 0, "redrawn": 0, "samplers": []}
    driver.WorkerGroup = crew
    path = driver.train(load(Path(__file__).parent / "tiny.yaml", [*OVERRIDES, *overrides]), folder)
    summary = json.loads((path / "summary.json").read_text())
    kept = {key: summary[key] for key in ("lora_checksum", "after", "images_drawn", "workers_lost")}
    return Observer.facts | kept


def main(what: str, folder: Path) -> None:
    head = NODE | {"include_dashboard": False, "temp_dir": f"{folder}/ray"}
    cluster, found = Cluster(initialize_head=True, head_node_args=head), {}
    if what != "join":
        extra = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    if what != "join":
        # So many that the two cores have a sampler each: with two, the learner is alone on one of them.
        more = ("loop.ahead=1", "cluster.samplers=3") if what == "ahead" else ("loop.ahead=0", "cluster.samplers=2")
        for name, crew in (("quiet", Observer), ("stormy", saboteur(cluster, extra))):
            found[name] = run(folder / name, crew, more)
    else:
        one = ("cluster.samplers=1", "cluster.max_samplers=2", "steps=4")
        found["elastic"] = run(folder / "elastic", newcomer(cluster), one)
        config = load(Path(__file__).parent / "tiny.yaml", [*OVERRIDES, *one])
        too_large = load(Path(__file__).parent / "tiny.yaml", [*OVERRIDES, "rewards.clip.pool.cpus=5"])
        checks = [*doctor.reach(cluster.address, config), *doctor.reach(cluster.address, too_large)[-1:]]
        found["doctor"] = [asdict(check) for check in [*checks, doctor.sync(cluster.address)]]
        found["lost_input"] = lost_input(cluster)
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    with mock.patch.object(sys, "executable", sys.argv[3]):  # which nodes start their workers with
        main(sys.argv[1], Path(sys.argv[2]))
