import json
import subprocess
import sys
from pathlib import Path


def test_the_doctor_proves_a_weight_sync_through_a_real_ray():
    command = [sys.executable, "-m", "align_cluster.cli", "doctor", "--json"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=180)
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert findings["weight sync"]["state"] == "ok", findings["weight sync"]
    assert "proven" in findings["weight sync"]["value"] and done.returncode == 0
