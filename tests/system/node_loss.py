"""A run on a Ray of several nodes, two of which go down on the way while two others join. Prints one JSON line.

Needs a Ray of its own, and Ray reads how soon a node counts as lost from the environment: test_nodes.py starts it.
"""

import json
import sys
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from align_cluster.cluster.placement import gone
from align_cluster.config.load import load
from align_cluster.loop import driver
from align_cluster.loop.crew import Crew

NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}
OVERRIDES = (
    "name=nodes",
    "algorithm.kind=grpo",
    "steps=3",
    "prompts_per_step=3",
    "rollout.group_size=16",  # images and records of a chunk are then too large to travel beside the answer
    "rollout.steps=4",
    "cluster.learners=1",
    "cluster.samplers=2",
    "cluster.max_samplers=3",
    "evaluate.count=1",
    "evaluate.images_per_prompt=1",
    "evaluate.grid_every=0",
    "evaluate.grid_prompts=1",
    "evaluate.grid_columns=1",
)


class Observer(Crew):
    """Says what happens to nodes, at which moments of the run."""

    facts: dict = {"lost_images": 0, "lost_records": 0, "samplers": []}

    def draw(self, chunks, request):
        answer = super().draw(chunks, request)
        self.facts["samplers"].append(len(self.samplers.staff))
        return answer

    def mend(self, drawn, part="record"):
        self.facts["lost_records"] += sum(gone([getattr(item, part) for item in drawn]))
        super().mend(drawn, part)

    def _draw_again(self, chunks, drawn, request):
        self.facts["lost_images"] += len(chunks)
        super()._draw_again(chunks, drawn, request)


def saboteur(cluster: Cluster, extra: object) -> type[Crew]:
    class Saboteur(Observer):
        node = extra

        def other_node(self) -> None:
            cluster.remove_node(self.node, allow_graceful=False)
            type(self).node = cluster.add_node(**NODE)

        def draw(self, chunks, request):
            self.armed = chunks[0].step == 1
            return super().draw(chunks, request)

        def report(self, stage, done, total):
            super().report(stage, done, total)
            if self.armed and stage == "rollout" and done == total:  # the last images are not scored yet
                self.armed = False
                self.other_node()

        def update(self, step, drawn, credit):
            if step == 2:
                self.other_node()
                time.sleep(5)  # until Ray knows; an update that is quicker finds the records still there
            return super().update(step, drawn, credit)

    return Saboteur


def main(folder: str) -> None:
    config = load(Path(__file__).parent / "tiny.yaml", OVERRIDES)
    cluster = Cluster(
        initialize_head=True, head_node_args=NODE | {"include_dashboard": False, "temp_dir": f"{folder}/ray"}
    )
    extra = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    found = {}
    for name, crew in (("quiet", Observer), ("stormy", saboteur(cluster, extra))):
        Observer.facts = {"lost_images": 0, "lost_records": 0, "samplers": []}
        driver.Crew = crew
        path = driver.train(config, Path(folder) / name)
        summary = json.loads((path / "summary.json").read_text())
        found[name] = Observer.facts | {key: summary[key] for key in ("lora_checksum", "after", "images_drawn")}
        found[name]["workers_lost"] = summary["workers_lost"]
        found[name]["state"] = json.loads((path / "state.json").read_text())
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
