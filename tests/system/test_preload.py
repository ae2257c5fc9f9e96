"""Forks of the process that has imported what workers need are, in all else, what an ordinary Python would be."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align_cluster.cluster.preload import Preload, imports
from align_cluster.config.load import load

from .conftest import TINY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")

ABOUT = """
import json, os, random, signal, sys
import numpy
print(json.dumps({
    "argv": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ), "nice": os.nice(0), "path": sys.path,
    "python": sys.executable, "name": __name__, "group": os.getpgrp(), "input": sys.stdin.read(),
    "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "children": signal.getsignal(signal.SIGCHLD), "interrupt": signal.getsignal(signal.SIGINT).__name__,
    "imported": "peft" in sys.modules, "random": [random.random(), numpy.random.random()],
}))
print("an error", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "about.py"
    path.write_text(ABOUT)
    return path


def told(python: list[str], script: Path, code: str) -> tuple[dict, subprocess.CompletedProcess]:
    def before() -> None:
        os.nice(1)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    environment = os.environ | {"ONLY": "here"}
    arguments = {"env": environment, "cwd": script.parent, "preexec_fn": before, "process_group": os.getpgrp()}
    done = subprocess.run([*python, script, code], input="words", capture_output=True, text=True, **arguments)
    assert done.stdout, done.stderr
    return json.loads(done.stdout), done


@pytest.mark.parametrize("code", ["0", "1"])
def test_a_fork_is_what_an_ordinary_process_would_be_but_for_its_imports(preload, script, code):
    plain, first = told([sys.executable], script, code)
    fork, second = told(preload.command, script, code)
    other, _ = told(preload.command, script, code)
    assert (plain.pop("imported"), fork.pop("imported")) == (False, True)
    numbers = [facts.pop("random") for facts in (plain, fork, other)]
    assert len({number for pair in numbers for number in pair}) == 6
    assert fork == plain
    assert (second.returncode, second.stderr) == (first.returncode, first.stderr) == (int(code), "an error\n")


def test_a_fork_ends_with_whoever_asked_for_it(preload, tmp_path):
    script = tmp_path / "sleep.py"
    script.write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    asked = subprocess.Popen([*preload.command, script], stdout=subprocess.PIPE, text=True)
    fork = int(asked.stdout.readline())
    assert fork != asked.pid
    asked.kill()
    asked.wait()
    until = time.monotonic() + 20
    while Path(f"/proc/{fork}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{fork}").exists()


def test_where_the_process_dies_workers_start_the_ordinary_way_and_one_line_says_so(script, caplog):
    with caplog.at_level(logging.WARNING), Preload() as preload:
        preload.process.kill()
        facts, done = told(preload.command, script, "0")
        folder = preload.folder
    assert not facts["imported"] and facts["name"] == "__main__" and done.returncode == 0
    assert "imports everything itself" in done.stderr
    assert len(caplog.records) == 1 and "workers start slowly" in caplog.text
    assert not folder.exists()


def test_it_imports_what_a_runs_own_workers_need_and_leaves_out_pools_with_packages_of_their_own():
    assert imports(load(TINY)) == [
        *("diffusers:StableDiffusion3Pipeline", "diffusers:SD3Transformer2DModel", "diffusers:AutoencoderKL"),
        *("transformers:CLIPModel", "transformers:AutoTokenizer", "transformers:AutoImageProcessor"),
    ]
    apart = load(TINY, ["rewards.clip.pool.pip=[six]"])
    assert not any(name.startswith("transformers") for name in imports(apart))
