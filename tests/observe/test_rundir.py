import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from align_cluster.errors import UserError
from align_cluster.files import atomic, read_json, write_json, write_text
from align_cluster.observe.rundir import RunDir

from .mounts import in_mount, needs_mounts


def test_a_new_run_never_overwrites_an_old_one(tmp_path):
    names = [RunDir.create(tmp_path / "out", "quickstart").path.name for _ in range(3)]
    assert names == ["quickstart", "quickstart-2", "quickstart-3"]


def test_an_empty_folder_is_taken_and_a_full_one_or_a_file_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert RunDir.create(tmp_path, "empty").path.name == "empty"
    assert RunDir.create(tmp_path, "full").path.name == "full-2"
    assert RunDir.create(tmp_path, "file").path.name == "file-2"
    assert (tmp_path / "full" / "keep.txt").read_text() == "mine"


def test_runs_that_start_at_once_get_different_folders(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        paths = list(pool.map(lambda _: RunDir.create(tmp_path, "same").path, range(48)))
    assert len(set(paths)) == 48
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    with pytest.raises(KeyError), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_reading_what_was_written(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"ü": [1, None]})
    write_text(tmp_path / "b.txt", "ein Satz\n")
    assert read_json(tmp_path / "deep" / "a.json") == {"ü": [1, None]}
    assert (tmp_path / "b.txt").read_text() == "ein Satz\n"
    assert read_json(tmp_path / "missing.json") is None


def test_grid_steps_are_numbers_in_order(tmp_path):
    run = RunDir.create(tmp_path, "r")
    for step in (1_000_000, 20, 0):
        run.grid(step).touch()
    (run.grids / "prompts.json").touch()
    assert run.grid(20).name == "step_000020.png"
    assert run.grid_steps() == [0, 20, 1_000_000]


def test_an_output_path_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="out: .*taken cannot hold runs"):
        RunDir.create(tmp_path / "taken", "run")


LOCK = """
import sys
from align_cluster.observe.rundir import RunDir
with RunDir(sys.argv[1]).lock():
    print(flush=True)
    sys.stdin.read()
"""


def test_a_lock_names_its_owner_and_goes_with_it_however_it_ends(tmp_path):
    run = RunDir.create(tmp_path, "r")
    for end in (lambda owner: owner.stdin.close(), lambda owner: owner.send_signal(signal.SIGKILL)):
        command = [sys.executable, "-c", LOCK, str(run.path)]
        owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        owner.stdout.readline()
        with pytest.raises(UserError) as refused, run.lock():
            pass
        assert f"{run.path} is in use by process {owner.pid} of " in str(refused.value)
        assert "\n" not in str(refused.value)
        end(owner)
        owner.wait()
        with run.lock():
            assert str(os.getpid()) in run.lock_file.read_text()
        assert run.lock_file.read_text() == ""


def test_a_directory_in_which_nothing_happened_is_removed_and_another_one_stays(tmp_path):
    empty, used = RunDir.create(tmp_path, "empty"), RunDir.create(tmp_path, "used")
    used.metrics.touch()
    empty.discard_unused()
    used.discard_unused()
    assert not empty.path.exists() and used.path.exists()


@needs_mounts
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("RunDir.create(folder, 'new')", "out: {} cannot hold runs (Read-only file system); give --out another folder"),
        ("RunDir(folder / 'old').lock().__enter__()", "{}/old cannot be written (Read-only file system); make it"),
    ],
)
def test_a_read_only_disk_is_one_sentence(tmp_path, code, said):
    """On a disk that is mounted read-only, since permissions do not stop root."""
    (tmp_path / "old").mkdir()
    python = f"""
from pathlib import Path
from align_cluster.observe.rundir import RunDir
from align_cluster.errors import UserError
folder = Path({str(tmp_path)!r})
try:
    {code}
except UserError as error:
    print(error)
"""
    printed = in_mount(tmp_path, "mount --bind {0} {0} && mount -o remount,ro,bind {0}", python)
    assert printed.startswith(said.format(tmp_path)) and printed.count("\n") == 1


FULL = """
from pathlib import Path
import numpy as np
from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.sd3 import SD3
from align_cluster.observe.rundir import RunDir
from align_cluster.files import storage
from align_cluster.errors import UserError
run = RunDir(Path({folder!r}) / "run")
backbone = SD3(SD3.Config(path="embedded"))
weights = adapter_parameters(add_adapters(backbone, backbone.load_denoiser(), ("default",)), "default")
try:
    with storage(run.path):
        backbone.save_lora({{name: np.array(value.detach()) for name, value in weights.items()}}, run.lora)
except UserError as error:
    print(error)
print(list(run.lora.iterdir()))
"""


@needs_mounts
def test_a_lora_that_has_no_room_is_one_sentence_and_leaves_no_half_of_it(tmp_path):
    printed = in_mount(tmp_path, "mount -t tmpfs -o size=300k tmpfs {0}", FULL.format(folder=str(tmp_path)))
    assert printed == (
        f"{tmp_path}/run cannot be written (No space left on device); make room, or let it be written, and go on with "
        "--resume auto\n[]\n"
    )


def test_a_grid_is_a_picture_of_a_step_and_no_link(tmp_path):
    run = RunDir.create(tmp_path, "run")
    run.grid(3).write_bytes(b"png")
    for name in ("step_x.png", "step_²²²²²².png", "step_.png", f"step_{'1' * 200}.png"):
        (run.grids / name).write_bytes(b"png")
    run.grid(4).symlink_to(run.grid(3))
    assert run.grid_steps() == [3]


def test_a_name_that_no_folder_can_have_leaves_nothing_behind(tmp_path):
    with pytest.raises(OSError, match="File name too long"):
        RunDir.create(tmp_path, "a" * 300)
    assert not list(tmp_path.iterdir())
