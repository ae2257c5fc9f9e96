import json
import subprocess
import sys
from pathlib import Path

import pytest

from align_cluster.cluster import checks, doctor
from align_cluster.cluster.checks import GIB
from align_cluster.cluster.nodes import fit, fit_on, node_checks

NODE = {"NodeManagerHostname": "a", "Resources": {"CPU": 8.0, "object_store_memory": 4.0 * GIB}}
FACTS = {
    "versions": {"torch": "2.13.0", "numpy": "2.4"},
    "disk": (0.5, 90 * GIB),
    "load": 1.0,
    "skew": 0.0,
}
HERE = FACTS["versions"]


def test_a_node_like_this_one_is_ok_and_others_are_told_apart():
    (fine,) = node_checks("node", NODE, FACTS, HERE)
    assert fine.state == "ok" and fine.value.startswith("a: 8 CPU, 0 GPU, object store 4.00 GiB, disk 90 GiB free")
    cases = {
        ("fail", "torch 2.12.0 (here 2.13.0)"): {"versions": {"torch": "2.12.0", "numpy": "2.4"}},
        ("warn", "numpy 2.3 (here 2.4)"): {"versions": {"torch": "2.13.0", "numpy": "2.3"}},
        ("warn", "disk of Ray's folder is 97 % full"): {"disk": (0.97, GIB)},
        ("warn", "its clock is -9 s off"): {"skew": -9.0},
    }
    for expected, change in cases.items():
        _, found = node_checks("node", NODE, FACTS | change, HERE)
        assert (found.state, found.value) == expected and found.remedy
    small = NODE | {"Resources": {"object_store_memory": 0.1 * GIB}}
    assert "object store of 0.10 GiB" in [check.value for check in node_checks("node", small, FACTS, HERE)]


@pytest.mark.slow
def test_a_weight_sync_to_every_node_is_proven_on_a_cluster(local_ray):
    proven = doctor.sync(local_ray.get_runtime_context().gcs_address)
    assert proven.state == "ok" and "to samplers on 1 node in" in proven.value and "proven" in proven.value


@pytest.mark.exhaustive
def test_the_doctor_proves_a_weight_sync_through_a_ray_of_its_own():
    code = "import sys; from align_cluster.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=180,
    )
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert found["weight sync"]["state"] == "ok", found["weight sync"]
    assert "to samplers on 1 node in" in found["weight sync"]["value"]
    assert "proven" in found["weight sync"]["value"] and done.returncode == 0


def test_a_run_is_compared_with_what_a_dashboard_says_of_its_nodes(tiny):
    config = tiny("nft", "cluster.samplers=1", "cluster.learners=1")
    fits = fit_on([{"CPU": 1.0}, {"CPU": 4.0, "memory": 1e9}], config)
    assert (fits.state, fits.value) == ("ok", "fits on 2 idle nodes: 1 samplers, 1 learners, 1 reward workers")
    cases = {
        "rewards ask for more CPU cores": ("rewards.clip.pool.cpus=9", [{"CPU": 4.0}]),
        "rewards ask for 1 GPUs in their pools, and there are 0": ("rewards.clip.pool.gpus=1", [{"CPU": 8.0}]),
        "no node has the 3 CPU of one place for workers": ("rewards.clip.pool.cpus=3", 4 * [{"CPU": 2.0}]),
    }
    for said, (override, nodes) in cases.items():
        found = fit_on(nodes, tiny("nft", "cluster.samplers=1", "cluster.learners=1", override))
        assert found.state == "fail" and said in found.value, found


def test_torchvision_is_tested_as_plain_diffusers_imports_it(tmp_path, monkeypatch):
    def found(source):
        (tmp_path / "torchvision.py").write_text(source)
        monkeypatch.chdir(tmp_path)
        return checks.torchvision()

    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    monkeypatch.setattr(checks, "package_version", lambda name: "1.0")
    assert found("").state == "ok"
    mended = found("import sys\nif 'align_cluster' not in sys.modules: raise RuntimeError('no operators')")
    assert mended.state == "warn" and "plain diffusers cannot be imported" in mended.value and mended.remedy
    assert found("raise RuntimeError('no operators')").state == "fail"


def test_a_missing_package_is_named_with_its_extra_and_what_it_is_for(monkeypatch):
    monkeypatch.setattr(
        checks,
        "package_version",
        lambda name: checks.pins("tested").get(name, "1") if name not in checks.OPTIONAL else None,
    )
    missing = {check.name: check for check in checks.packages() if check.state == "warn"}
    assert set(missing) == set(checks.OPTIONAL)
    assert missing["scipy"].remedy == "for geneval's detector mask2former: pip install 'align-cluster[rewards]'"
    assert missing["fastapi"].remedy == "for reward services: pip install 'align-cluster[serve]'"


def test_a_run_that_fits_and_one_that_does_not_are_told_apart(local_ray, tiny):
    fits = fit(tiny("nft", "cluster.samplers=1", "cluster.learners=1"))
    lacks = fit(tiny("nft", "rewards.clip.pool.cpus=9"))
    assert (fits.state, fits.value) == ("ok", "fits: 1 samplers, 1 learners, 1 reward workers")
    assert lacks.state == "fail" and "rewards ask for more CPU cores" in lacks.value
