import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from align_cluster.checkpoint import CheckpointConfig
from align_cluster.checkpoint.store import MANIFEST, Damaged, Store
from align_cluster.checkpoint.writer import Job, Writer
from align_cluster.errors import UserError

FILES = {"state.safetensors": bytes(range(256)) * 100, "run.json": b'{"step": 1}'}


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    path = str(tmp_path / "checkpoints") if request.param == "local" else f"memory://{tmp_path}/checkpoints"
    return Store(path)


def tamper(store: Store, step: int, name: str, change) -> None:
    path = f"{store.folder(step)}/{name}"
    store.files.pipe_file(path, change(store.files.cat_file(path)))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_what_is_written_is_read(store):
    assert store.steps() == [] and store.newest(pytest.fail) is None
    store.write(7, FILES, {"score": 0.5})
    store.write(12, FILES | {"run.json": b"{}"}, {"score": None})
    assert store.steps() == [7, 12]
    assert store.read(7) == (FILES, {"score": 0.5})
    assert store.newest(pytest.fail) == (12, FILES | {"run.json": b"{}"})
    assert store.newest(pytest.fail, lambda about: about["score"])[0] == 7


def test_the_same_step_is_replaced(store):
    store.write(7, FILES, {})
    store.write(7, {"run.json": b"new"}, {})
    assert store.read(7) == ({"run.json": b"new"}, {})


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("state.safetensors", lambda data: data[:-1], "bytes instead of"),
        ("state.safetensors", lambda data: b"", "0 bytes instead of"),
        ("state.safetensors", lambda data: data + b"\0", "bytes instead of"),
        ("state.safetensors", lambda data: flipped(data, 0), "checksum"),
        ("state.safetensors", lambda data: flipped(data, len(data) - 1), "checksum"),
        ("run.json", lambda data: flipped(data, 3), "checksum"),
        (MANIFEST, lambda data: data[: len(data) // 2], "cannot be read"),
        (MANIFEST, lambda data: data.replace(b'"step": 12', b'"step": 13'), "checksum of manifest.json"),
        (MANIFEST, lambda data: data.replace(b'"sha256": "', b'"sha256": "0'), "checksum"),
    ],
)
def test_a_torn_truncated_or_flipped_checkpoint_is_found_out_and_the_one_before_is_taken(store, name, change, said):
    notes = []
    store.write(7, FILES, {})
    store.write(12, FILES, {})
    tamper(store, 12, name, change)
    with pytest.raises(Damaged, match=said):
        store.read(12)
    assert store.newest(notes.append) == (7, FILES)
    (note,) = notes
    assert "step_000012 is damaged" in note and said in note and note.endswith("the one before it is taken")


def test_every_single_flipped_bit_of_a_small_checkpoint_is_found_out_or_harmless(tmp_path):
    store = Store(str(tmp_path))
    store.write(1, {"run.json": b'{"a": 1}'}, {})
    for name in ("run.json", MANIFEST):
        path = tmp_path / "step_000001" / name
        whole = path.read_bytes()
        for at in range(len(whole)):
            for bit in range(8):
                path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
                try:
                    assert store.read(1)[0] == {"run.json": b'{"a": 1}'}
                    assert name == MANIFEST
                except Damaged:
                    pass
        path.write_bytes(whole)


def test_a_folder_under_the_name_of_another_step_is_found_out(tmp_path):
    store = Store(str(tmp_path))
    store.write(1, FILES, {})
    os.rename(store.folder(1), store.folder(9))
    with pytest.raises(Damaged, match="is of step 1"):
        store.read(9)


def test_a_missing_file_is_found_out_and_a_folder_without_manifest_does_not_count(store):
    for step in (1, 2, 3):
        store.write(step, FILES, {})
    store.files.rm_file(f"{store.folder(2)}/run.json")
    store.files.rm_file(f"{store.folder(3)}/{MANIFEST}")
    assert store.steps() == [1, 2]
    assert store.newest(lambda note: None)[0] == 1


KILLED = """
import os, signal, sys
from align_cluster.checkpoint.store import Store
import align_cluster.checkpoint.store as module
count, at = 0, int(sys.argv[2])
def counted(event, arguments):
    global count
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and sys.argv[1] in str(arguments[0]):
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(counted)
Store(sys.argv[1]).write(2, {"a": b"new" * 1000, "b": b"new"}, {})
print("written")
"""


def test_a_writer_killed_before_any_of_its_file_operations_leaves_the_one_before_or_the_new_one(tmp_path):
    """SIGKILL before the first operation, the second ... until one write gets through."""
    states, old = [], {"a": b"old", "b": b"old"}
    for at in range(1, 40):
        store = Store(str(tmp_path / str(at)))
        store.write(1, old, {})
        store.write(2, old, {})
        done = subprocess.run(
            [sys.executable, "-c", KILLED, store.root, str(at)], capture_output=True, env=os.environ, check=False
        )
        step, files = store.newest(pytest.fail)
        assert files in (old, {"a": b"new" * 1000, "b": b"new"})
        states.append((step, files["b"]))
        store.clean()
        assert all(name.startswith("step_") for name in os.listdir(store.root))
        if b"written" in done.stdout:
            break
    assert b"written" in done.stdout and states[0] == (2, b"old") and states[-1] == (2, b"new")


def test_the_newest_by_step_counts_whatever_the_clock_says(tmp_path):
    store = Store(str(tmp_path))
    for step in (10, 20):
        store.write(step, FILES, {})
    for step, when in ((10, 4e9), (20, 0)):
        os.utime(store.folder(step), (when, when))
    assert store.newest(pytest.fail)[0] == 20


def test_the_newest_and_the_best_are_kept(store):
    for step, score in enumerate([0.1, 0.9, 0.3, None, 0.2], start=1):
        store.write(step, FILES, {"score": score})
    store.prune(2, True)
    assert store.steps() == [2, 4, 5]
    store.prune(1, False)
    assert store.steps() == [5]


def test_the_newest_good_one_outlives_those_of_a_collapse(store):
    for step in range(1, 7):
        store.write(step, FILES, {"score": None, "good": step < 3})
        store.prune(2, True)
    assert store.steps() == [2, 5, 6]


def test_what_lies_under_a_checkpoints_name_but_is_none_does_not_count(tmp_path):
    store = Store(str(tmp_path))
    store.write(2, FILES, {})
    for name in ("step_²", "step_٣", "step_2", f"step_{'1' * 200}", "step_0000x2", "other"):
        shutil.copytree(store.folder(2), tmp_path / name)
    assert store.steps() == [2]


def test_a_step_of_seven_digits_replaces_itself_alone(store):
    for step in (234_567, 1_234_567, 1_234_567):
        store.write(step, FILES, {})
    assert store.steps() == [234_567, 1_234_567]


def signed(store: Store, step: int, change) -> None:
    """Let `change` alter a manifest, and sign it again as anybody can."""
    path = f"{store.folder(step)}/{MANIFEST}"
    manifest = json.loads(store.files.cat_file(path))
    del manifest["sha256"]
    changed = change(manifest)
    manifest = manifest if changed is None else changed
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    signed = manifest | {"sha256": digest} if isinstance(manifest, dict) else manifest
    store.files.pipe_file(path, json.dumps(signed).encode())


def renamed(name: str):
    return lambda manifest: manifest["files"].update({name: manifest["files"]["run.json"]})


@pytest.mark.parametrize(
    "change",
    [
        *(renamed(name) for name in ("../outside", "/etc/passwd", "..", "a/b", ".hidden", "", "a\0b", "a" * 300)),
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.pop("step"),
        lambda manifest: manifest.pop("about"),
        lambda manifest: manifest.update(about=[]),
        lambda manifest: manifest.update(about={"score": "high"}),
        lambda manifest: manifest.update(about={"good": "no"}),
        lambda manifest: manifest.update(files=["run.json"]),
        lambda manifest: manifest["files"].update({"run.json": 3}),
        lambda manifest: manifest["files"]["run.json"].update(bytes="1"),
        lambda manifest: manifest["files"]["run.json"].update(bytes=-1),
        lambda manifest: manifest["files"]["run.json"].update(sha256=None),
        lambda manifest: manifest.update(step=[]),
        lambda manifest: manifest.update(format={}),
        lambda manifest: [],
        lambda manifest: 3,
    ],
)
def test_a_manifest_that_somebody_signed_again_names_plain_files_and_is_whole_or_damaged(store, change):
    notes = []
    store.write(7, FILES, {})
    store.write(12, FILES, {})
    signed(store, 12, change)
    assert store.newest(notes.append) == (7, FILES) and "step_000012 is damaged" in notes[0]
    store.prune(2, True)
    assert store.steps() == [7, 12]


def test_a_deep_or_endless_manifest_is_damaged(store):
    store.write(7, FILES, {})
    for content in (b"[" * 100_000, b'{"a": ' * 2000, b" " * 2**21, b'{"step": ' + b"1" * 5000 + b"}", b"\xff"):
        store.files.pipe_file(f"{store.folder(7)}/{MANIFEST}", content)
        assert store.newest(lambda note: None) is None


def test_links_are_neither_read_nor_followed(tmp_path):
    store, secret = Store(str(tmp_path / "checkpoints")), tmp_path / "secret"
    secret.write_bytes(FILES["run.json"])
    store.write(1, FILES, {})
    store.write(2, FILES, {})
    run = Path(store.folder(2)) / "run.json"
    run.unlink()
    run.symlink_to(secret)
    with pytest.raises(Damaged, match=r"run\.json cannot be read"):
        store.read(2)
    elsewhere = tmp_path / "elsewhere"
    os.rename(store.folder(1), elsewhere)
    Path(store.folder(1)).symlink_to(elsewhere)
    assert store.steps() == [2]
    store.write(3, FILES, {})
    store.prune(1, False)
    assert sorted(os.listdir(elsewhere)) == sorted([*FILES, MANIFEST]) and secret.exists()


def test_a_store_that_works_passes_its_probe_and_is_left_as_it_was(store):
    store.probe()
    assert store.folders() == set()


@pytest.mark.parametrize(
    "path",
    ["nowhere://x", "http://127.0.0.1:9/x", "/dev/null", "/dev/null/x", "/proc/x", "zip://x", "zip://x::/tmp/none.zip"]
    + ["s3://bucket/x", "~nobodyhere/x", "a\0b", "a" * 300, "data:,x"],
)
def test_a_place_that_cannot_keep_checkpoints_is_named_at_the_start(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError) as caught:
        Store(path).probe()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_place_that_does_not_answer_is_named(tmp_path, monkeypatch):
    store, answer = Store(str(tmp_path)), threading.Event()
    monkeypatch.setattr("align_cluster.checkpoint.store.PROBE_S", 0.1)
    monkeypatch.setattr(store, "_write_local", lambda *given: answer.wait(60))
    with pytest.raises(UserError, match=r"no answer in 0\.1 s"):
        store.probe()
    answer.set()


@pytest.mark.parametrize("path", ["memory://runs", "nosuchfs://x", "zip://x::/tmp/a.zip"])
def test_an_address_that_no_run_can_use_is_refused_with_the_settings(path):
    (said,) = CheckpointConfig(path=path).problems("checkpoint", None)
    assert said.startswith(f"checkpoint.path is {path}, which") and "give a folder" in said
    for fine in ("s3://bucket/runs", "/shared/runs", "runs", "file:///shared/runs", None):
        assert not list(CheckpointConfig(path=fine).problems("checkpoint", None))


def test_saving_does_not_wait_for_the_disk_and_the_next_save_waits_for_the_one_before(tmp_path):
    gate, order = threading.Event(), []

    def slow() -> dict[str, bytes]:
        gate.wait(60)
        order.append("first")
        return FILES

    writer = Writer(Store(str(tmp_path)), CheckpointConfig(), pytest.fail)
    writer.save(Job(1, slow))
    assert writer.saved is None
    order.append("training went on")
    gate.set()
    writer.save(Job(2, lambda: order.append("second") or FILES))
    writer.wait()
    assert order == ["training went on", "first", "second"] and writer.saved == 2


FULL = """
import resource, sys
from align_cluster.checkpoint import CheckpointConfig
from align_cluster.checkpoint.store import Store
from align_cluster.checkpoint.writer import Job, Writer
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
writer = Writer(Store(sys.argv[1]), CheckpointConfig(), print)
writer.save(Job(1, lambda: {"a": b"small"}))
writer.save(Job(2, lambda: {"a": b"too large" * 100_000}))
writer.wait()
print(writer.saved)
"""


def test_a_checkpoint_that_does_not_fit_costs_no_training_and_leaves_the_one_before(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)
    note, saved = done.stdout.splitlines()
    assert "checkpoint of step 2 could not be written" in note and "File too large" in note
    assert "training goes on, the last one is of step 1" in note and saved == "1"
    assert os.listdir(tmp_path) == ["step_000001"]


def test_a_folder_of_a_store_is_plain_files_that_sha256sum_can_check(tmp_path):
    store = Store(str(tmp_path))
    store.write(3, FILES, {})
    assert sorted(os.listdir(store.folder(3))) == sorted([*FILES, MANIFEST])
    assert isinstance(fsspec.filesystem("file"), type(store.files))
