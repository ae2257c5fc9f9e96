import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from align_cluster.observe.rundir import RunDir, atomic, read_json, write_json, write_text
from align_cluster.types import UserError


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
