"""A run that is ended at any moment and goes on later leaves what a run leaves that nobody disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hooked import HookedWorkers
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from align_cluster.checkpoint.store import Store
from align_cluster.errors import Preempted, UserError
from align_cluster.loop import driver
from align_cluster.loop.state import State
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import read_jsonl

from ..inprocess import assert_same_run
from ..observe.mounts import in_mount, needs_mounts
from .conftest import TINY

STEPS = (
    "steps=4",
    "checkpoint.every=2",
    "evaluate.every=3",
    "evaluate.images_per_prompt=1",
    "optimizer.schedule=linear",
)
JOBS = {
    "nft": STEPS,
    "grpo": (
        *STEPS,
        *("learner.updates_per_step=2", "advantage.std=batch", "advantage.shaping.kind=slas"),
        *("prompts_per_step=4", "advantage.shaping.gamma=adaptive", "advantage.shaping.bound=worst_case"),
        *("advantage.shaping.refresh=2", "advantage.shaping.delta=1"),
    ),
    "ppo": (
        *STEPS,
        *("learner.updates_per_step=2", "rollout.group_size=2", "algorithm.critic_lr=3e-3"),
        *("algorithm.critic.width=32", "algorithm.critic.heads=4", "algorithm.warm_up.updates=2"),
        *("algorithm.critic_epochs=1", "algorithm.replay={images: 10, states: 2, minibatch: 2}"),
    ),
}
# What is measured in seconds, or is a matter of who was free.
TIMES = ("seconds", "time/", "throughput/", "scoring/", "idle/", "weights/adopt_s")


def preempting(moment: str, at: int) -> type[HookedWorkers]:
    """Workers whose driver is sent SIGTERM at its `at`-th step (from 0), before or after the thing called `moment`."""

    class Preempted(HookedWorkers):
        sent, drawn, trained = False, None, None  # the steps that are drawn and trained

        def send(self, now: str, step: int | None) -> None:
            if now == moment and step == at and not self.sent:
                self.sent = True
                os.kill(os.getpid(), signal.SIGTERM)

        def begin(self, chunks, request):
            self.drawn = chunks[0].step
            return super().begin(chunks, request)

        def report(self, stage, done, total):
            super().report(stage, done, total)
            if done:
                self.send(stage, self.drawn)

        def update(self, step, *args):
            self.trained = step
            self.send("before update", step)
            trained = super().update(step, *args)
            self.send("after update", step)
            return trained

        def publish(self, source):
            self.send(f"publish {source}", self.trained)
            return super().publish(source)

    return Preempted


@pytest.fixture(scope="module")
def undisturbed(tiny, train):
    """By job, each made at first use."""

    class Runs(dict):
        def __missing__(self, kind):
            self[kind] = train(tiny(kind, *JOBS[kind]))
            return self[kind]

    return Runs()


@pytest.fixture
def sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def rows(path: Path) -> list[dict]:
    def kept(name: str) -> bool:
        return not name.startswith(TIMES) and not name.endswith("images_per_s")

    return [{name: row[name] for name in row if kept(name)} for row in read_jsonl(RunDir(path).metrics)]


def scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(RunDir(path).tensorboard)).Reload()
    names = board.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in board.Scalars(name)] for name in names if kept_tag(name)}


def kept_tag(name: str) -> bool:
    return not name.startswith(TIMES) and not name.endswith("images_per_s")


def assert_no_seam(resumed: Path, whole: Path) -> None:
    """Everything but times is the same: LoRA, numbers, evaluations, TensorBoard, grids, critic."""
    first, second = (json.loads(RunDir(path).summary.read_text()) for path in (resumed, whole))
    for key in ("lora_checksum", "before", "after", "images_drawn", "config_hash", "self_check", "steps"):
        assert first[key] == second[key], key
    assert rows(resumed) == rows(whole)
    seconds = [row["seconds"] for row in read_jsonl(RunDir(resumed).metrics)]
    assert seconds == sorted(seconds)
    assert RunDir(resumed).evaluations.read_bytes() == RunDir(whole).evaluations.read_bytes()
    assert scalars(resumed) == scalars(whole)
    for name in sorted({str(file.relative_to(whole)) for file in whole.glob("grids/*.png")}):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("lora/pytorch_lora_weights.safetensors", "critic/critic.safetensors"):
        if (whole / name).exists():
            there, here = load_file(whole / name), load_file(resumed / name)
            assert there.keys() == here.keys() and all((there[key] == here[key]).all() for key in there)


CASES = [
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("nft", "reward", 2),
            ("ppo", "before update", 3),
        ]
    ),
    pytest.param("grpo", "after update", 1, marks=pytest.mark.exhaustive),
    pytest.param("nft", "publish evaluation", 2, marks=pytest.mark.exhaustive),
    pytest.param("nft", "publish behaviour", 3, marks=pytest.mark.exhaustive),
    pytest.param("ppo", "publish evaluation", 3, marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("kind", "moment", "at"), CASES)
def test_sigterm_at_any_moment_saves_and_the_resumed_run_has_no_seam(
    undisturbed, tiny, tmp_path, monkeypatch, sigterm, kind, moment, at
):
    config = tiny(kind, *JOBS[kind])
    with monkeypatch.context() as patch:
        patch.setattr(driver, "WorkerGroup", preempting(moment, at))
        with pytest.raises(Preempted):
            driver.train(config, tmp_path)
    path = driver.train(config, tmp_path, "auto")
    assert json.loads(RunDir(path).summary.read_text())["resumed"] == 1
    assert_no_seam(path, undisturbed[kind].path)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_it_ends_in_the_same_weights(
    undisturbed, tiny, tmp_path, capsys
):
    whole = undisturbed["nft"].path
    run = tmp_path / "nft"
    subprocess.run(["cp", "-r", whole, run], check=True)
    RunDir(run).summary.unlink()
    state = run / "checkpoints" / "step_000004" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    driver.train(tiny("nft", *JOBS["nft"]), tmp_path, str(run))
    assert "step_000004 is damaged: the checksum of state.safetensors is wrong" in " ".join(
        capsys.readouterr().out.split()
    )
    assert_no_seam(run, whole)


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_more_steps_extend_it(undisturbed, tiny, tmp_path, capsys):
    run = tmp_path / "nft"
    subprocess.run(["cp", "-r", undisturbed["nft"].path, run], check=True)
    summary = RunDir(run).summary.read_bytes()
    assert driver.train(tiny("nft", *JOBS["nft"]), tmp_path, "auto") == run
    assert "has finished its 4 steps" in capsys.readouterr().out and RunDir(run).summary.read_bytes() == summary
    driver.train(tiny("nft", *JOBS["nft"], "steps=5"), tmp_path, "auto")
    assert [row["step"] for row in read_jsonl(RunDir(run).metrics)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_checkpoint_branches_off_into_a_directory_of_its_own(undisturbed, tiny, tmp_path):
    whole = undisturbed["nft"].path
    path = driver.train(tiny("nft", *JOBS["nft"], "name=branch"), tmp_path, str(whole / "checkpoints" / "step_000003"))
    assert path == tmp_path / "branch"
    assert (rows(path), scalars(path)) == (rows(whole), scalars(whole))
    assert (whole / "checkpoints" / "step_000004").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("optimizer.lr=1e-3", "seed=3"), ["seed: 0 there, 3 here", "optimizer.lr: 0.005 there, 0.001 here"]),
        (("algorithm.kind=grpo",), ["algorithm.kind"]),
        (("steps=3",), ["4 steps are done, and steps is 3"]),
    ],
)
def test_another_runs_settings_are_refused_with_the_keys_that_differ(undisturbed, tiny, overrides, words):
    with pytest.raises(UserError) as refused:
        driver.train(tiny("nft", *JOBS["nft"], *overrides), Path("unused"), str(undisturbed["nft"].path))
    assert all(word in str(refused.value) for word in words)


def test_two_runs_in_one_directory_are_refused_with_the_owners_name(undisturbed, tiny):
    run = undisturbed["nft"].path
    hold = "from align_cluster.observe.rundir import RunDir; import sys\nwith RunDir(sys.argv[1]).lock():\n"
    hold += "    print('locked', flush=True); sys.stdin.read()"
    owner = subprocess.Popen(
        [sys.executable, "-c", hold, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"is in use by process {owner.pid} of "):
            driver.train(tiny("nft", *JOBS["nft"]), run.parent, str(run))
        os.kill(owner.pid, signal.SIGKILL)  # the lock goes with its owner
        owner.wait()
        assert driver.train(tiny("nft", *JOBS["nft"]), run.parent, str(run)) == run
    finally:
        owner.kill()


def start(folder: Path, *arguments: str, address: str = "") -> subprocess.Popen:
    """`train` of the nft job as a user starts it, in a process group of its own; on the Ray at `address`, if given."""
    command = [sys.executable, "-m", "align_cluster.cli", "train", str(TINY)]
    command += ["--set", "algorithm.kind=nft", *JOBS["nft"], "--name", "nft", "--out", str(folder), *arguments]
    log = (folder / "log").open("a")
    environment = os.environ | ({"RAY_ADDRESS": address} if address else {})
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


@pytest.mark.slow
def test_the_command_ends_with_75_on_sigterm_and_with_resume_auto_goes_on(tiny, in_process, tmp_path):
    """SIGTERM as batch systems send it: to all that the command started, which has a Ray of its own."""
    # As the run in this process that it is compared with, where one learner trains and no grid is drawn.
    one = ("cluster.learners=1", "evaluate.grid_every=0", "evaluate.images_per_prompt=2")
    process = start(tmp_path, "--resume", "auto", "--set", *one)
    try:
        while len(read_jsonl(tmp_path / "nft" / "metrics.jsonl")) < 2:  # the first step is finished then
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 75
        assert start(tmp_path, "--resume", "auto", "--set", *one).wait(300) == 0
    finally:
        process.kill()
    assert_same_run(in_process(tiny("nft", *JOBS["nft"], *one)), tmp_path / "nft")


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_from_its_last_checkpoint(undisturbed, tmp_path, local_ray):
    """On a cluster that outlives it."""
    undisturbed["nft"]  # now, because it would share the cores
    address = local_ray.get_runtime_context().gcs_address
    process = start(tmp_path, address=address)
    try:
        while len(read_jsonl(tmp_path / "nft" / "metrics.jsonl")) < 3:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path, "--resume", "auto", address=address).wait(300) == 0
    assert_no_seam(tmp_path / "nft", undisturbed["nft"].path)


@pytest.mark.slow
def test_a_collapse_rolls_the_weights_back_and_the_prompts_go_on(tiny, train, capsys):
    """The limit is broken as soon as there are five norms to compare with, after step 6."""
    rule = "guard.grad_norm={limit: 1.0e-6, patience: 1, action: rollback}"
    kept = ("steps=7", "checkpoint.every=2", "checkpoint.keep=9", "evaluate.grid_every=0", "guard.rollbacks=1")
    path = train(tiny("nft", rule, *kept, "evaluate.images_per_prompt=1")).path
    said = " ".join(capsys.readouterr().out.split())
    assert "rolled back to the weights after step 4; prompts and seeds go on" in said
    store = Store(str(RunDir(path).checkpoints))
    assert store.steps() == [2, 4, 6, 7]
    states = {step: State.of(step, store.read(step)[0]).learner for step in (4, 6, 7)}
    assert states[4].manifest.checksum == states[6].manifest.checksum != states[7].manifest.checksum
    assert [row["step"] for row in read_jsonl(RunDir(path).metrics)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.slow
@needs_mounts
def test_a_disk_that_fills_up_costs_checkpoints_and_no_step(undisturbed, tmp_path):
    """On a disk with room for the run's files and not for a checkpoint."""
    (tmp_path / "disk").mkdir()
    mount = "mount -t tmpfs -o size=3m tmpfs {0}/disk"
    code = "import sys; from align_cluster.cli import main; print(main(sys.argv[1:]))"
    arguments = ["train", str(TINY), "--set", "algorithm.kind=nft", *JOBS["nft"], "--name", "nft"]
    arguments += ["--out", str(tmp_path / "disk")]
    code = f"import sys; sys.argv[1:] = {arguments!r}\n{code}\n"
    code += f"import shutil; shutil.copytree({str(tmp_path / 'disk' / 'nft')!r}, {str(tmp_path / 'kept')!r})"
    printed = in_mount(tmp_path, mount, code)
    assert "the checkpoint of step 2 could not be written" in printed and printed.splitlines()[-1] == "0"
    assert rows(tmp_path / "kept") == rows(undisturbed["nft"].path)
    assert not list((tmp_path / "kept" / "checkpoints").iterdir())
