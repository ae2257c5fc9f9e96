"""deploy/observe: its expressions name what the package declares, and a real Prometheus finds all of it in a run."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from align_cluster.observe.metrics import declared
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.trackers.prometheus import series

ROOT = Path(__file__).parents[2]
OBSERVE = ROOT / "deploy" / "observe"
DECLARED = {f"ray_{name}": labels for name, labels in (series(metric.pattern) for metric in declared())}
GRAFANA = {"$__rate_interval": "1m", "$run": ".*"}  # what Grafana puts in the place of its variables
PATIENCE_S = 300


def panels() -> list[dict]:
    return [panel for panel in json.loads((OBSERVE / "dashboard.json").read_text())["panels"] if "targets" in panel]


def alerts() -> list[dict]:
    return [rule for group in yaml.safe_load((OBSERVE / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [*shown, *(rule["expr"] for rule in alerts())]


def names(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_every_name_in_the_dashboard_and_the_alerts_is_declared_with_the_labels_that_are_used():
    used = set()
    for expression in expressions():
        found = names(expression)
        assert found and found <= DECLARED.keys(), expression
        labels = {label for name in found for label in DECLARED[name]}
        asked = {label for inner in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in inner.split(", ")}
        assert asked <= labels, expression
        used |= found
    assert len(used) > 25


def test_texts_name_only_labels_that_the_expression_keeps():
    texts = [(rule["expr"], " ".join(rule["annotations"].values())) for rule in alerts()]
    texts += [(one["expr"], one["legendFormat"]) for panel in panels() for one in panel["targets"]]
    for expression, text in texts:
        kept = {label for inner in re.findall(r"by \(([^)]*)\)", expression) for label in inner.split(", ")}
        assert set(re.findall(r"{{ ?(?:\$labels\.)?([a-z]\w*) ?}}", text)) <= kept, expression


def test_panels_have_places_of_their_own_and_say_where_they_read():
    taken = [tuple(panel["gridPos"][key] for key in "xy") for panel in panels()]
    assert len(set(taken)) == len(taken) > 15
    assert all(panel["datasource"]["uid"] == "${datasource}" and panel["title"] for panel in panels())


def program(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} is not installed: Debian's package prometheus brings it")


def test_promtool_takes_the_alerts_and_the_configuration():
    promtool = program("promtool")
    for what, file in (("rules", "alerts.yml"), ("config", "prometheus.yml")):
        done = subprocess.run([promtool, "check", what, OBSERVE / file], capture_output=True, text=True)
        assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


# Values of each minute from 0 on, and the alerts that they raise after an hour.
CASES = {
    "a quiet run": ({'run_step_began_at{run="a"}': "0+60x60", 'time_step{run="a"}': "60x60"}, []),
    "one that hangs": ({'run_step_began_at{run="a"}': "600x60", 'time_step{run="a"}': "60x60"}, ["NoStep"]),
    "long steps": ({'run_step_began_at{run="a"}': "1800x60", 'time_step{run="a"}': "1200x60"}, []),
    "a long start": ({'run_step_began_at{run="a"}': "1800x60", 'run_step{run="a"}': "0x60"}, []),
    "a start that hangs": ({'run_step_began_at{run="a"}': "-600x60", 'run_step{run="a"}': "0x60"}, ["NoStep"]),
    "lost workers": ({'workers_lost{run="a", pool="sampler"}': "0x50 2x10"}, ["WorkersLost"]),
    "workers lost long ago": ({'workers_lost{run="a", pool="sampler"}': "0x10 2x50"}, []),
    "no workers": ({'workers_ready{run="a", pool="sampler"}': "0x60"}, ["NoWorkers"]),
    "failed scores": ({'reward_failed_total{run="a", name="clip"}': "0x50 3x10"}, ["ScoresFail"]),
    "masked images": ({'group_masked{run="a"}': "0.1x60"}, ["ImagesMasked"]),
    "a reward that is slow": (
        {
            'scoring_p95{run="a", pool="clip"}': "40x60",
            'scoring_queue{run="a", pool="clip"}': "200x60",
            'time_step{run="a"}': "60x60",
        },
        ["RewardQueue"],
    ),
    "idle pools": (
        {'idle_samplers{run="a"}': "0.95x60", 'idle_learners{run="a"}': "0.95x60"},
        ["SamplersIdle", "LearnersIdle"],
    ),
    "a broken rule": ({'guard_broken{run="a", rule="grad_norm"}': "0x50 3x10"}, ["GuardBroken"]),
    "updates that are not finite": (
        {'train_skipped_total{run="a"}': "0x50 2x10", 'rollout_non_finite_total{run="a"}': "0x60"},
        ["NotFinite"],
    ),
}


def test_each_alert_is_raised_by_what_it_is_for_and_by_nothing_else(tmp_path):
    promtool, every = program("promtool"), [rule["alert"] for rule in alerts()]
    assert {name for _, raised in CASES.values() for name in raised} == set(every)
    tests = []
    for case, (given, raised) in CASES.items():
        values = [{"series": f"ray_align_cluster_{name}", "values": text} for name, text in given.items()]
        counts = [
            {
                "expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}}) or vector(0)',
                "eval_time": "1h",
                "exp_samples": [{"labels": "{}", "value": int(name in raised)}],
            }
            for name in every
        ]
        tests.append({"name": case, "interval": "1m", "input_series": values, "promql_expr_test": counts})
    file = tmp_path / "tests.yml"
    text = {"rule_files": [str(OBSERVE / "alerts.yml")], "evaluation_interval": "1m", "tests": tests}
    file.write_text(yaml.safe_dump(text))
    done = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def asked(port: int, path: str, **query: object) -> list[dict]:
    """Ask Prometheus's API."""
    address = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(address, timeout=30) as answer:
        return json.load(answer)["data"]


@pytest.mark.exhaustive
def test_a_real_prometheus_finds_a_run_and_every_expression_has_data(tmp_path):
    prometheus, out = program("prometheus"), tmp_path / "runs"
    out.mkdir()
    shutil.copy(OBSERVE / "alerts.yml", tmp_path)
    settings = yaml.safe_load((OBSERVE / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = settings["scrape_configs"]
    found = job["file_sd_configs"][0]
    assert found["files"][0] == "../../runs/*.prometheus.json"
    found |= {"files": ["runs/*.prometheus.json"], "refresh_interval": "1s"}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    tiny = ["--set", "track=[{kind: prometheus}]", "--set", "steps=30", "--out", str(out)]
    align = [sys.executable, "-m", "align_cluster.cli", "train", str(ROOT / "tests/system/tiny.yaml"), *tiny]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    run = subprocess.Popen(align, stdout=log, stderr=log, cwd=ROOT)
    try:
        seen, end = 0.0, time.monotonic() + PATIENCE_S
        while run.poll() is None:
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(1)
            if server.poll() is None and RunDir(out / "tiny").prometheus.exists():
                rows = asked(port, "query", query="ray_align_cluster_time_step")["result"]
                seen = time.time() if rows else seen
        assert run.returncode == 0 and seen, (tmp_path / "log").read_text()
        for expression in expressions():
            text = expression
            for variable, value in GRAFANA.items():
                text = text.replace(variable, value)
            assert asked(port, "query", query=text, time=seen)["resultType"] == "vector"
            for wanted in names(expression) if expression in [rule["expr"] for rule in alerts()] else [text]:
                assert asked(port, "query", query=wanted, time=seen)["result"], wanted
        rules = asked(port, "rules")["groups"][0]["rules"]
        assert [rule["health"] for rule in rules] == ["ok"] * len(alerts()), rules
        assert not RunDir(out / "tiny").prometheus.exists()  # so that Prometheus does not look for a run that has ended
    finally:
        for process in (run, server):
            process.terminate()
            process.wait(60)
