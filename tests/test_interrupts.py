"""SIGTERM and Ctrl-C, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align_cluster.errors import Preempted
from align_cluster.interrupts import interrupted, interruptible, uninterrupted

TINY = Path(__file__).parent / "system" / "tiny.yaml"
LEAVING = """
import os, signal, time
from align_cluster.cli import main
from align_cluster.cli import commands
from align_cluster.interrupts import begun, interruptible

def work(args):
    with interruptible(alone=True):
        begun()
        try:
            print("at work", flush=True)
            time.sleep(60)
        finally:
            time.sleep(2)  # saving
            print("saved", flush=True)

commands.train = work
raise SystemExit(main(["train", "any.yaml"]))
"""


def test_the_first_signal_ends_the_work_and_later_ones_do_not_disturb_the_saving():
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        process = subprocess.Popen(
            [sys.executable, "-c", LEAVING],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout.readline() == "at work\n"
        for _ in range(3):
            process.send_signal(number)
            time.sleep(0.2)
        printed, errors = process.communicate(timeout=60)
        assert (process.returncode, printed) == (code, "saved\n") and "Traceback" not in errors


def test_a_command_that_is_told_to_end_while_it_starts_ends_with_75(tmp_path):
    """Whatever it does at that time: it imports, and then it starts Ray."""
    command = ["train", str(TINY), "--out", str(tmp_path)]
    text = f"import sys; from align_cluster.cli import main; print(1, flush=True); sys.exit(main({command}))"
    for seconds in (0.3, 3.0):
        process = subprocess.Popen(
            [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(seconds)
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        assert errors.splitlines()[-1] == "ended by SIGTERM; start again with --resume auto"


def test_a_block_that_belongs_together_is_finished_first():
    done = []
    with pytest.raises(Preempted), interruptible():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupted()
            done.append("row")
            done.append("state")
        done.append("never")
    assert done == ["row", "state"] and not interrupted()


def test_handlers_are_given_back_and_an_inner_context_changes_nothing():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interruptible():
        outer = signal.getsignal(signal.SIGTERM)
        with interruptible(alone=True):
            assert signal.getsignal(signal.SIGTERM) == outer
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
