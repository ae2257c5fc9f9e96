import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "conditions.py"
RESULTS = SCRIPT.parent / "results" / "conditions.json"


def assert_flat(found: dict) -> None:
    """Memory of the last row is that of the first one, whose caches were full already."""
    first, *_, last = found["rows"]
    assert first["prompts"] >= 2 * found["fit"] and last["prompts"] == found["prompts"]
    grown = last["prompts"] - first["prompts"]
    assert grown > 3 * found["fit"]
    for row in found["rows"]:
        assert row["object_store_mib"] < 1.15 * found["store_bound_mib"] + 1  # objects have headers
        assert row["disk_mib"] < 1.1 * found["disk_bound_mib"]  # two samplers, each 2 % between two looks
        assert row["kept"] < 1.02 * first["kept"]  # two kinds of different sizes share the bound
    for name in ("driver_own_mib", "samplers_own_mib"):
        assert last[name] - first[name] < 5 + 0.001 * grown  # a condition and its perturbation take .017 MiB


@pytest.mark.exhaustive
def test_memory_stays_flat_over_many_small_caches(tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "ALIGN_CLUSTER_CACHE")}
    command = [sys.executable, SCRIPT, "--quick", "--out", tmp_path / "found.json"]
    paths = os.pathsep.join(map(str, (SCRIPT.parent, SCRIPT.parents[1])))
    done = subprocess.run(command, env=env | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_flat(json.loads((tmp_path / "found.json").read_text()))
    assert done.stdout.count("\n| ") == 9


def test_the_kept_run_had_twenty_thousand_prompts_and_stayed_flat():
    kept = json.loads(RESULTS.read_text())
    assert kept["prompts"] == 20_000 and len(kept["rows"]) >= 8
    assert_flat(kept)
