"""Waiting: nothing waits for ever, and whoever sets the machine's clock disturbs time stamps alone."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "align_cluster"
# Where the time of day is wanted, and for what.
TIME_OF_DAY = {
    "cluster/learners.py": "when a trouble was",
    "cluster/pool.py": "when a trouble was",
    "cluster/nodes.py": "clocks of other machines",
    "cluster/run_status.py": "the age of what another process wrote",
    "conditions/cache.py": "the age of files that other processes write",
    "loop/heartbeat.py": "the beat that is looked at from other machines",
    "loop/tracking.py": "when a step began, for a Prometheus on another machine",
    "observe/logs.py": "when a line was logged",
    "observe/trackers/mlflow.py": "when a value was measured",
}


def readers(source: str) -> list[int]:
    """Lines that read a clock which can be set."""
    names = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow")}
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and (getattr(node.value, "id", getattr(node.value, "attr", "")), node.attr) in names
    ]


def test_only_time_stamps_come_from_a_clock_that_can_be_set():
    assert sorted(readers("import time\nwait(until=time.time() + 5)\ndatetime.datetime.now()")) == [2, 3]
    found = {str(file.relative_to(PACKAGE)): readers(file.read_text()) for file in PACKAGE.rglob("*.py")}
    assert sorted(name for name, lines in found.items() if lines) == sorted(TIME_OF_DAY)


def unbounded(source: str) -> list[int]:
    """Lines that wait for Ray without a deadline."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    waits = [call for call in calls if ast.unparse(call.func) in ("ray.get", "ray.wait", "ray.experimental.get")]
    return sorted(call.lineno for call in waits if not any(word.arg == "timeout" for word in call.keywords))


def test_every_wait_for_ray_has_a_deadline():
    assert unbounded("ray.get(ref)\nray.get(ref, timeout=5)\nray.wait(refs)") == [1, 3]
    found = {str(file.relative_to(PACKAGE)): unbounded(file.read_text()) for file in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}
