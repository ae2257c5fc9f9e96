"""The doctor's look at a run from outside: what state.json, which the run writes every few seconds, says of it."""

import os
import platform
import time
from pathlib import Path
from typing import Any

from align_cluster.cluster.checks import Finding
from align_cluster.files import read_json
from align_cluster.observe.rundir import RunDir

GO_ON = "`align-cluster train CONFIG --resume auto` goes on from its last checkpoint"
OLD_S = 30.0  # a run writes its state every 2 s


def examine_run(path: Path) -> list[Finding]:
    """Step and phase, the driver, every worker, and the last troubles of a run."""
    run = RunDir(path)
    if not run.config.exists():
        return [Finding("fail", "run", f"{path} is no run directory", "give the folder that `train` named, runs/NAME")]
    state = read_json(run.state)
    if state is None:
        return [
            Finding("fail", "run", f"no {run.state.name} in {path}", "the run has not come so far, or is an old one")
        ]
    findings = [_progress(state), _driver(state), *(_worker(state, worker) for worker in state["workers"])]
    for trouble in state["troubles"][-5:]:
        at = time.strftime("%H:%M:%S", time.localtime(trouble["at"]))
        findings.append(Finding("warn", f"at {at}", trouble["what"]))
    return findings


def _progress(state: dict[str, Any]) -> Finding:
    where = f"step {state['step']} of {state['steps']}"
    if state["phase"] == "done":
        return Finding("ok", "run", f"{where}: done")
    if state["phase"] == "failed":
        return Finding("fail", "run", f"{where}: {state['error']}", f"when that is mended, {GO_ON}")
    counts = [f"{stage} {done} of {total}" for stage, (done, total) in state["progress"].items() if done < total]
    text = ", ".join([f"{where}: {state['phase']} since {state['seconds']:.0f} s", *counts])
    return Finding("ok" if state["seconds"] < 10 * state["late_s"] else "warn", "run", text)


def _driver(state: dict[str, Any]) -> Finding:
    age, who = time.time() - state["beat"], f"pid {state['pid']} on {state['host']}"
    if state["phase"] in ("done", "failed"):
        return Finding("ok", "driver", f"{who} has ended")
    if state["host"] == platform.node() and not _alive(state["pid"]):
        return Finding("fail", "driver", f"{who} is gone since {age:.0f} s", GO_ON)
    if abs(age) > OLD_S:
        remedy = "look whether its machine is up, stopped, or has another clock"
        return Finding("fail", "driver", f"{who} gave no sign of life for {age:.0f} s", remedy)
    return Finding("ok", "driver", f"{who}, last sign of life {max(0.0, age):.0f} s ago")


def _worker(state: dict[str, Any], worker: dict[str, Any]) -> Finding:
    late = worker["waiting"] and worker["seconds"] > state["late_s"]
    hurt = late or "last error" in worker["phase"]
    place = f" ({worker['place']})" if worker["place"] else ""
    return Finding(
        "warn" if hurt else "ok", worker["name"], f"{worker['phase']} since {worker['seconds']:.0f} s{place}"
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
