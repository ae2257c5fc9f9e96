"""What `doctor RUN` says of a run: from a real one's state, and from states of runs that are in trouble."""

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from hooked import HookedWorkers

from align_cluster.cli import main
from align_cluster.cluster.run_status import examine_run
from align_cluster.files import write_json, write_text
from align_cluster.loop import driver
from align_cluster.loop.heartbeat import Heartbeat
from align_cluster.loop.tracking import feeds
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import read_jsonl

WORKER = {"name": "sampler-0", "location": "10.0.0.2 pid 77", "phase": "draw (1, 0, 0)", "seconds": 3, "waiting": True}
STATE = {
    "host": os.uname().nodename,
    "pid": os.getpid(),
    "step": 2,
    "steps": 9,
    "phase": "draw",
    "seconds": 4.0,
    "progress": {"rollout": [1, 8], "reward": [8, 8]},
    "late_s": 60.0,
    "workers": [WORKER],
    "events": [],
    "error": None,
}


@pytest.fixture
def run(tmp_path):
    """Function (changes to STATE) -> the checks by name of a run in that state."""

    def examine(**changes):
        write_text(RunDir(tmp_path).config, "name: run\n")
        write_json(RunDir(tmp_path).state, STATE | {"beat": time.time()} | changes)
        return {check.name: check for check in examine_run(tmp_path)}

    return examine


def test_a_run_that_works_is_ok_with_its_step_phase_and_workers(run):
    found = run()
    assert {check.state for check in found.values()} == {"ok"}
    assert found["run"].value == "step 2 of 9: draw since 4 s, rollout 1 of 8"
    assert found["sampler-0"].value == "draw (1, 0, 0) since 3 s (10.0.0.2 pid 77)"


def test_a_worker_that_is_late_or_quarantined_is_pointed_at(run):
    late = WORKER | {"seconds": 61.0}
    lost = WORKER | {"name": "sampler slot 1", "phase": "quarantined, next try in 9 s; last error: boom"}
    found = run(workers=[late, lost, WORKER | {"name": "idle", "seconds": 999.0, "waiting": False}])
    assert found["sampler-0"].state == found["sampler slot 1"].state == "warn" and found["idle"].state == "ok"
    assert "last error: boom" in found["sampler slot 1"].value
    assert run(events=[{"at": time.time(), "what": "sampler-0 was lost"}]).popitem()[1].value == "sampler-0 was lost"


def test_the_log_of_a_worker_that_is_late_or_was_lost_is_named_where_it_is_on_this_machine(run, tmp_path):
    for process in (77, 78):
        write_text(tmp_path / f"worker-abc-01000000-{process}.err", "")
    lost = {"at": time.time(), "what": "sampler-1 (10.0.0.2 pid 78) was lost: boom; a new one starts"}
    elsewhere = {"at": time.time() - 60, "what": "sampler-2 (10.0.0.2 pid 79) was lost: boom; a new one starts"}
    found = run(logs=str(tmp_path), workers=[WORKER | {"seconds": 61.0}], events=[elsewhere, lost])
    assert found["sampler-0"].remedy == f"its log is {tmp_path}/worker-abc-01000000-77.err"
    told = [check.remedy for name, check in found.items() if name.startswith("at ")]
    assert told == ["", f"its log is {tmp_path}/worker-abc-01000000-78.err"]
    assert found["workers' logs"].value.startswith(f"{tmp_path}/worker-*-PID.err")


def test_a_driver_that_is_gone_or_silent_is_a_failure(run):
    assert "is gone since" in run(pid=2**22 + 1)["driver"].value
    assert run(pid=2**22 + 1)["driver"].state == "fail"
    silent = run(beat=time.time() - 100, host="elsewhere")["driver"]
    assert silent.state == "fail" and "no sign of life for 100 s" in silent.value
    assert run(pid=2**22 + 1, phase="done", workers=[])["driver"].state == "ok"
    assert run(phase="failed", error="UserError: no")["run"].value == "step 2 of 9: UserError: no"


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 1
    assert "is no run directory" in capsys.readouterr().out


def test_a_run_writes_what_it_does_while_it_does_it_and_says_who_is_late(tiny, train, monkeypatch, caplog):
    """In the second step's draw one sampler stands still; a look from outside then sees it, and so does the log."""
    seen, watches, ranks = [], [], []

    class Slow(HookedWorkers):
        def publish(self, source):
            if len(ranks) == 1:  # the driver has just waited for the learner's model, for the first time
                ranks.append((self.ranks.status()[0], self.ranks.asked is self.ranks.built))
            return super().publish(source)

        def begin(self, chunks, request):
            if not ranks:
                ranks.append((self.ranks.status()[0], self.ranks.asked is self.ranks.built))
            if chunks[0].step == 1:
                self.samplers.wait_until(lambda: len(self.samplers.ready_workers) == self.samplers.size)
                process = int(self.samplers.workers[0].location.split()[-1])
                os.kill(process, signal.SIGSTOP)
                threading.Timer(9, lambda: seen.append(json.loads(watches[0].file.read_text()))).start()
                threading.Timer(10, os.kill, [process, signal.SIGCONT]).start()
            return super().begin(chunks, request)

    class Seen(Heartbeat):
        def __enter__(self):
            watches.append(self)
            return super().__enter__()

    followed = []
    monkeypatch.setattr(driver, "feeds", lambda *given: followed.extend(feeds(*given)) or followed)
    monkeypatch.setattr(driver, "WorkerGroup", Slow)
    monkeypatch.setattr(driver, "Heartbeat", Seen)
    with caplog.at_level(logging.WARNING):
        done = train(tiny("nft", "cluster.late_s=3", "evaluate.grid_every=0", "track=[{kind: prometheus}]"))
    (asked, loads), (answered, loaded) = ranks
    assert loads and loaded and answered.since == asked.since  # since it was asked, and not since the driver waited
    assert not asked.waiting and asked.phase in ("loading its model", "idle") and answered.phase == "idle"
    (state,) = seen
    assert (state["step"], state["phase"], state["pid"]) == (2, "rollout", os.getpid()) and state["seconds"] > 4
    (worker,) = [worker for worker in state["workers"] if worker["name"] == "sampler-0"]
    assert worker["phase"].split()[0] in ("encode", "draw_chunk") and worker["waiting"] and worker["seconds"] > 4
    said = [record.getMessage() for record in caplog.records]
    assert any(f"waits for sampler-0 ({worker['location']}): {worker['phase']} since" in line for line in said)
    assert "sampler-0" in [getattr(record, "worker", None) for record in caplog.records]
    assert list(Path(state["logs"]).glob(f"worker-*-{worker['location'].split()[-1]}.err"))
    (prometheus,) = followed  # whose gauges are Ray's
    shown = prometheus.tracker.shown
    assert prometheus.given == prometheus.taken > 4 and shown["run/step"] == 2 and shown["workers/sampler/lost"] == 0
    rows = read_jsonl(RunDir(done.path).metrics)
    assert shown.keys() >= rows[1].keys() - {"step", "seconds", "rollout/non_finite", "train/skipped", "train/empty"}
    assert "held_out/reward/geneval" in shown and "guard/grad_norm/broken" in shown
    found = {check.name: check for check in examine_run(done.path)}
    assert found["run"].value == "step 2 of 2: done" and found["driver"].state == "ok"
