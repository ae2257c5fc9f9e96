"""The doctor's checks of a run, from the state.json that the run writes every two seconds while it works."""

import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align_cluster.cluster.checks import Check
from align_cluster.files import read_json
from align_cluster.observe.rundir import RunDir

GO_ON = "`align-cluster train CONFIG --resume auto` goes on from its last checkpoint"
SILENT_S = 30.0  # seconds without a new state.json after which a driver counts as silent: 15 writes are missing
EVENTS = 5  # how many of the run's last events are shown


def examine_run(path: Path) -> list[Check]:
    """Check the run in the folder `path`: step and phase, the driver, every worker, and the last lost workers."""
    run = RunDir(path)
    if not run.config.exists():
        return [Check("fail", "run", f"{path} is no run directory", "give the folder that `train` named, runs/NAME")]
    state = read_json(run.state)
    if state is None:
        remedy = "the run has not come so far, or is an old one"
        return [Check("fail", "run", f"no {run.state.name} in {path}", remedy)]
    if "events" not in state:
        remedy = "start the run again with this version, by --resume auto"
        return [Check("fail", "run", f"{run.state} was written by another version", remedy)]
    checks = [_progress(state), _driver(state), *_idle(state), *(_worker(state, worker) for worker in state["workers"])]
    for event in state["events"][-EVENTS:]:
        at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
        checks.append(Check("warn", f"at {at}", event["what"], _log_of(state, event["what"])))
    if state.get("logs"):
        text = f"{state['logs']}/worker-*-PID.err and .out, on the node of the worker with that pid"
        checks.append(Check("ok", "workers' logs", text))
    return checks


def _progress(state: dict[str, Any]) -> Check:
    where = f"step {state['step']} of {state['steps']}"
    if state["phase"] == "done":
        return Check("ok", "run", f"{where}: done")
    if state["phase"] == "failed" and state["error"] == "interrupted":
        return Check("warn", "run", f"{where}: interrupted", GO_ON)
    if state["phase"] == "failed":
        return Check("fail", "run", f"{where}: {state['error']}", f"when that is mended, {GO_ON}")
    counts = [f"{stage} {done} of {total}" for stage, (done, total) in state["progress"].items() if done < total]
    text = ", ".join([f"{where}: {state['phase']} since {state['seconds']:.0f} s", *counts])
    return Check("ok" if state["seconds"] < 10 * state["late_s"] else "warn", "run", text)


def _idle(state: dict[str, Any]) -> Iterator[Check]:
    """Say what share of the last step each kind of worker waited, where the run has come so far."""
    if shares := state.get("idle"):
        text = ", ".join(f"{name.removeprefix('idle/')} {share:.0%}" for name, share in shares.items())
        yield Check("ok", "waited in the last step", text)


def _driver(state: dict[str, Any]) -> Check:
    age, who = time.time() - state["beat"], f"pid {state['pid']} on {state['host']}"
    if state["phase"] in ("done", "failed"):
        return Check("ok", "driver", f"{who} has ended")
    if state["host"] == platform.node() and not _exists(state["pid"]):
        return Check("fail", "driver", f"{who} is gone since {age:.0f} s", GO_ON)
    if abs(age) > SILENT_S:
        remedy = "look whether its machine is up, stopped, or has another clock"
        return Check("fail", "driver", f"{who} gave no sign of life for {age:.0f} s", remedy)
    return Check("ok", "driver", f"{who}, last sign of life {max(0.0, age):.0f} s ago")


def _worker(state: dict[str, Any], worker: dict[str, Any]) -> Check:
    late = worker["waiting"] and worker["seconds"] > state["late_s"]
    lost = "last error" in worker["phase"]
    place = f" ({worker['location']})" if worker["location"] else ""
    text = f"{worker['phase']} since {worker['seconds']:.0f} s{place}"
    if not (late or lost):
        return Check("ok", worker["name"], text)
    return Check("warn", worker["name"], text, _log_of(state, text))


def _log_of(state: dict[str, Any], text: str) -> str:
    """Return where the log of the worker lies whose process the text names, if that is on this machine."""
    process = re.search(r"\bpid (\d+)\)", text)
    if not (process and state.get("logs")):
        return ""
    found = sorted(Path(state["logs"]).glob(f"worker-*-{process[1]}.err"))
    return f"its log is {found[-1]}" if found else ""


def _exists(pid: int) -> bool:
    """Return whether this machine has a process `pid`, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
