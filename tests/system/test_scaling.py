"""Scaling experiments: what grows with the nodes, what is kept, and runs on some of a Ray's nodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align_cluster.cluster.nodes import software
from align_cluster.cluster.placement import nodes
from align_cluster.config.load import config_hash, load
from align_cluster.errors import UserError
from align_cluster.scaling import chart, efficiency, experiment, overrides, table

from .conftest import TINY

COUNTED = ["cluster.samplers=2", "cluster.max_samplers=3", "rewards.clip.pool.workers=2", "loop.ahead=1"]


def job(more):
    return load(TINY, more)


def point(images_per_s):
    return {"samplers": 1, "learners": 1, "reward_workers": 1, "images": 8, "step_s": 1.0, "sync_s": 0.1} | {
        "images_per_s": images_per_s,
        "idle": {"samplers": 0.5, "learners": 0.25, "rewards": 0.0},
    }


@pytest.fixture
def found():
    return {"weak": True, "nodes": {"1": point(10.0), "2": point(19.0), "4": point(36.0)}}


def test_a_step_grows_with_the_nodes_in_weak_scaling_alone_and_counted_workers_in_both():
    config = load(TINY, COUNTED)
    weak, strong = (load(TINY, [*COUNTED, *overrides(config, 3, weak, 5)]) for weak in (True, False))
    assert (weak.prompts_per_step, strong.prompts_per_step) == (6, 2)
    for one in (weak, strong):
        assert (one.cluster.samplers, one.cluster.max_samplers, one.cluster.learners) == (6, 9, None)
        assert one.cluster.reward_workers == 3 and one.rewards["clip"].pool.workers == 6
        assert one.steps == 1 + 5 + 1  # the first one waits for workers, and the last one draws nothing ahead


def test_efficiency_is_the_rate_of_a_node_over_that_of_the_fewest(found):
    assert efficiency(found) == pytest.approx({1: 1.0, 2: 0.95, 4: 0.9})
    assert efficiency({"nodes": {"2": point(10.0), "8": point(30.0)}}) == pytest.approx({2: 1.0, 8: 0.75})


def test_a_table_of_80_columns_and_a_chart_hold_all_points(found):
    from rich.console import Console

    console = Console(width=80, record=True)
    console.print(table(found))
    text = console.export_text()
    assert all(word in text for word in ("0.95", "36.0", "1/1/1", "50/25/0", "efficiency"))
    assert "measured" in chart(found) and "nodes" in chart(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 9}, "steps"),
        ({"weak": False}, "weak"),
        ({"software": {"ray": "1"}}, "software"),
        ({"job": "x"}, "job"),
    ],
)
def test_a_folder_of_another_experiment_is_refused(tmp_path, change, words):
    about = {"job": config_hash(job([])), "weak": True, "steps": 2, "software": software(), "nodes": {}}
    (tmp_path / "scale.json").write_text(json.dumps(about | change))
    with pytest.raises(UserError, match=rf"is of another experiment \({words} differ\); name another folder"):
        experiment(job, [1], True, 2, tmp_path)


def test_more_nodes_than_cores_are_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="--nodes 4096: this machine has .* cores; ask for fewer nodes, or give --addr"):
        experiment(job, [1, 4096], True, 2, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_node_that_the_cluster_lacks_is_named_beside_those_it_has(local_ray):
    (node,) = nodes()
    for name in (node["NodeID"], node["NodeManagerHostname"], node["NodeManagerAddress"]):
        assert nodes([name]) == [node]
    there = rf"it has {node['NodeManagerHostname']} \({node['NodeManagerAddress']}\)"
    with pytest.raises(UserError, match=f"cluster.nodes: the cluster has no node 'elsewhere'; {there}"):
        nodes([node["NodeID"], "elsewhere"])


@pytest.mark.slow
def test_an_experiment_on_a_cluster_goes_on_where_it_was_and_refuses_more_nodes_than_there_are(local_ray, tmp_path):
    def here(more):
        return load(TINY, [f"cluster.address={local_ray.get_runtime_context().gcs_address}", *more])

    first = experiment(here, [1], True, 1, tmp_path)
    assert first["nodes"]["1"]["images"] == 8 and first["nodes"]["1"]["images_per_s"] > 0
    assert experiment(here, [1], True, 1, tmp_path) == first == json.loads((tmp_path / "scale.json").read_text())
    with pytest.raises(UserError, match="--nodes 3: the cluster has 1 node; ask for at most 1"):
        experiment(here, [1, 3], True, 1, tmp_path)


@pytest.mark.exhaustive
def test_the_command_runs_a_job_on_one_and_two_nodes_of_this_machine(tmp_path):
    command = [sys.executable, "-m", "align_cluster.cli", "scale", str(TINY), "--nodes", "1", "2", "--strong"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    command += ["--steps", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "scale.json").read_text())
    one, two = found["nodes"]["1"], found["nodes"]["2"]
    assert (one["samplers"], two["samplers"]) == (1, 2) and one["images"] == two["images"] == 8
    assert "These nodes share one machine" in done.stdout and (tmp_path / "out" / "scale.svg").exists()
