import json
import subprocess
import sys
from pathlib import Path

from align_cluster.cluster import doctor


def test_the_doctor_proves_a_weight_sync_through_a_real_ray():
    command = [sys.executable, "-m", "align_cluster.cli", "doctor", "--json"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=180)
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert findings["weight sync"]["state"] == "ok", findings["weight sync"]
    assert "proven" in findings["weight sync"]["value"] and done.returncode == 0


def test_a_missing_package_is_named_with_its_extra_and_what_it_is_for(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in doctor.OPTIONAL else "1.0")
    missing = {finding.name: finding for finding in doctor.packages() if finding.state == "warn"}
    assert set(missing) == set(doctor.OPTIONAL)
    assert missing["scipy"].remedy == "for geneval's detector mask2former: pip install 'align-cluster[rewards]'"
    assert missing["fastapi"].remedy == "for reward services: pip install 'align-cluster[serve]'"
