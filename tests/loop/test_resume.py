"""Where a run works and what it goes on from, with real checkpoints and without workers."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from align_cluster.backbones import BACKBONES
from align_cluster.checkpoint.store import Store
from align_cluster.cluster.nodes import software
from align_cluster.config.load import dump, load
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.files import write_json, write_text
from align_cluster.learner.state import Snapshot
from align_cluster.loop.inputs import BLOCK, WHOLE, digest, inputs
from align_cluster.loop.resume import StartingPoint, starting_point
from align_cluster.loop.state import State
from align_cluster.observe.rundir import RunDir
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.images import survey
from align_cluster.rewards import REWARDS
from align_cluster.rewards.detectors import DETECTORS
from align_cluster.streams import VERSION

TINY = Path(__file__).parents[1] / "system" / "tiny.yaml"


def tiny(*overrides: str) -> RunConfig:
    return load(TINY, ["steps=9", *overrides])


def read(config: RunConfig) -> dict[str, str]:
    """What a run hashes before it begins."""
    return inputs(
        config, *(PROMPTS[source.kind](source).load() for source in (config.prompts, config.evaluate.prompts))
    )


def begin(config: RunConfig, out: Path, resume: str | None, note: Callable) -> AbstractContextManager[StartingPoint]:
    return starting_point(config, out, resume, note, read(config))


def state(config: RunConfig, step: int, **facts) -> State:
    learner = Snapshot.of({"updates": step, "steps": step}, {"adapter/default/a": np.full(3, step, np.float32)})
    rows = "".join(json.dumps({"step": at}) + "\n" for at in range(1, step + 1)).encode()
    facts = {
        "config": config.model_dump(mode="json"),
        "versions": software(),
        "streams": VERSION,
        "inputs": read(config),
    } | facts
    credit = {"00/0": np.arange(3.0), "00/1": np.array([True, False])}
    return State(step, facts, learner, credit, lambda: {"metrics.jsonl": rows, "evaluations.jsonl": b""})


def checkpoints(config: RunConfig, folder: Path | str, *steps: int) -> None:
    for step in steps:
        Store(str(folder)).write(step, state(config, step).files(), {})


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A run that got to step 5 and has checkpoints of 2 and 4."""
    made = RunDir.create(tmp_path, "tiny")
    write_text(made.config, dump(tiny()))
    checkpoints(tiny(), made.checkpoints, 2, 4)
    write_text(made.metrics, "".join(json.dumps({"step": at}) + "\n" for at in range(1, 6)))
    return made


def test_a_state_goes_into_files_and_back():
    before = state(tiny(), 4, before={"overall": {"a": 0.1}}, clock={"wall": 1.5})
    after = State.of(4, before.files())
    assert after.facts["before"] == {"overall": {"a": 0.1}} and after.texts() == before.texts()
    assert after.learner.counts == before.learner.counts
    assert after.learner.manifest.checksum == before.learner.manifest.checksum
    for name, value in before.credit.items():
        np.testing.assert_array_equal(after.credit[name], value)
        assert after.credit[name].dtype == value.dtype


def test_auto_takes_the_newest_checkpoint_and_the_rows_up_to_it(run, tmp_path):
    with begin(tiny(), tmp_path, "auto", lambda note: None) as begun:
        assert (begun.run.path, begun.steps) == (run.path, 4)
        assert run.metrics.read_text().count("\n") == 4
        with pytest.raises(UserError, match="is in use by process"), begin(tiny(), tmp_path, "auto", print):
            pass


def test_auto_begins_a_run_where_there_is_none_and_plain_train_never_goes_on(run, tmp_path):
    with begin(tiny("name=other"), tmp_path, "auto", lambda note: None) as begun:
        assert begun.state is None and begun.run.path.name == "other"
        begun.run.metrics.touch()
    with begin(tiny(), tmp_path, None, pytest.fail) as begun:
        assert begun.state is None and begun.run.path.name == "tiny-2"


def test_auto_takes_the_last_of_several_runs_that_has_a_checkpoint(run, tmp_path):
    for name in ("tiny-2", "tiny-10", "tiny-11", "tiny-big"):
        (tmp_path / name).mkdir()
    for name in ("tiny-2", "tiny-10", "tiny-big"):
        checkpoints(tiny(), tmp_path / name / "checkpoints", 3)
    with begin(tiny(), tmp_path, "auto", lambda note: None) as begun:
        assert begun.run.path.name == "tiny-10"


def test_a_run_directory_can_be_named_from_anywhere(run, tmp_path):
    with begin(tiny("name=x"), tmp_path / "elsewhere", str(run.path), pytest.fail) as begun:
        assert begun.run.path == run.path and begun.steps == 4


def test_a_checkpoint_that_is_named_begins_a_directory_of_its_own_with_its_history(run, tmp_path):
    with begin(tiny(), tmp_path, str(run.checkpoints / "step_000002"), pytest.fail) as begun:
        assert begun.run.path.name == "tiny-2" and begun.steps == 2
        assert begun.run.metrics.read_text().count("\n") == 2
    assert run.metrics.read_text().count("\n") == 5 and Store(str(run.checkpoints)).steps() == [2, 4]


def test_a_finished_run_is_known_by_its_summary(run, tmp_path):
    checkpoints(tiny(), run.checkpoints, 9)
    with begin(tiny(), tmp_path, "auto", lambda note: None) as begun:
        assert not begun.finished(tiny())
    write_json(run.summary, {"steps": 9})
    with begin(tiny(), tmp_path, "auto", lambda note: None) as begun:
        assert begun.finished(tiny())
    with begin(tiny("steps=12"), tmp_path, "auto", lambda note: None) as begun:
        assert not begun.finished(tiny("steps=12"))


def test_checkpoints_elsewhere_bring_back_a_run_whose_machine_is_gone(tmp_path):
    far = f"checkpoint.path=memory://{tmp_path.name}"
    checkpoints(tiny(), f"memory://{tmp_path.name}/tiny", 6)
    with (
        pytest.raises(UserError, match="holds checkpoints of another run"),
        begin(tiny(far), tmp_path, None, print),
    ):
        pass
    assert not list(tmp_path.iterdir())
    with begin(tiny(far), tmp_path, "auto", lambda note: None) as begun:
        assert begun.steps == 6 and begun.run.path == tmp_path / "tiny"
        assert begun.run.metrics.read_text().count("\n") == 6


def test_where_every_checkpoint_is_damaged_nothing_is_begun_in_its_place(run, tmp_path):
    for step in (2, 4):
        (run.checkpoints / f"step_00000{step}" / "run.json").write_bytes(b"")
    notes = []
    told = pytest.raises(UserError, match="holds no checkpoint that can be read")
    with told, begin(tiny(), tmp_path, "auto", notes.append):
        pass
    assert [note.split()[1][-11:] for note in notes[1:]] == ["step_000004", "step_000002"]
    assert run.metrics.read_text().count("\n") == 5


def of_facts(change):
    """Alter run.json inside a checkpoint."""

    def changed(files):
        facts = json.loads(files["run.json"])
        change(facts)
        files["run.json"] = json.dumps(facts).encode()

    return changed


@pytest.mark.parametrize(
    "change",
    [
        *(lambda files, name=name: files.pop(name) for name in ("run.json", "state.safetensors")),
        lambda files: files.update({"run.json": b"no json"}),
        lambda files: files.update({"run.json": b"[1, 2]"}),
        lambda files: files.update({"run.json": b"[" * 100_000}),
        lambda files: files.update({"state.safetensors": b"no tensors"}),
        lambda files: files.update({"metrics.jsonl": b"\xff"}),
        of_facts(lambda facts: facts.pop("learner")),
        of_facts(lambda facts: facts.pop("config")),
        of_facts(lambda facts: facts.update(config=[])),
        of_facts(lambda facts: facts.update(versions=None)),
        of_facts(lambda facts: facts["learner"].pop("updates")),
    ],
)
def test_a_checkpoint_of_other_content_is_damaged_and_the_one_before_is_taken(run, tmp_path, change):
    files, notes = state(tiny(), 5).files(), []
    change(files)
    Store(str(run.checkpoints)).write(5, files, {})
    with begin(tiny(), tmp_path, "auto", notes.append) as begun:
        assert begun.steps == 4
    assert "step_000005 is damaged: it is not the state of a run" in notes[1]
    with (
        pytest.raises(UserError, match="cannot be used: it is not the state of a run") as refused,
        begin(tiny(), tmp_path, str(run.checkpoints / "step_000005"), print),
    ):
        pass
    assert "\n" not in str(refused.value)


def test_a_checkpoint_brings_back_the_runs_line_files_and_no_other(run, tmp_path):
    Store(str(run.checkpoints)).write(5, state(tiny(), 5).files() | {"other.jsonl": b"", "config.yaml": b""}, {})
    before = run.config.read_text()
    with begin(tiny(), tmp_path, "auto", lambda note: None):
        pass
    assert run.config.read_text() == before and not (run.path / "other.jsonl").exists()


def test_a_place_that_cannot_keep_checkpoints_is_refused_before_a_run_begins(tmp_path):
    for resume in (None, "auto"):
        refused = pytest.raises(UserError, match="checkpoint.path: /dev/null cannot keep checkpoints")
        with refused, begin(tiny("checkpoint.path=/dev/null"), tmp_path, resume, print):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "allowed",
    [
        *("steps=20", "cluster.learners=4", "cluster.samplers=3", "checkpoint.every=1", "learner.zero_stage=3"),
        *("evaluate.every=2", "evaluate.grid_every=7", "guard.contrast.action=stop", "name=other"),
        *("rewards.clip.pool.workers=3", "learner.gradient_checkpointing=true"),
        "rewards.clip.on_failure.stop_after=null",
    ],
)
def test_what_does_not_make_it_another_run_may_change(run, tmp_path, allowed):
    with begin(tiny(allowed), tmp_path, str(run.path), pytest.fail) as begun:
        assert begun.steps == 4


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("seed=1", "seed: 0 there, 1 here"),
        ("algorithm.beta=0.5", "algorithm.beta"),
        ("prompts.split=held_out", 'prompts.split: "train" there, "held_out" here'),
        ("evaluate.count=1", "evaluate.count: 2 there, 1 here"),
        ("rewards.clip.weight=2", "rewards.clip.weight"),
        ("rewards.clip.pool.batch=2", "rewards.clip.pool.batch: null there, 2 here"),
        ("exploration.kind=e2po", "exploration: null there"),
        ("steps=3", "4 steps are done, and steps is 3; set steps to more"),
    ],
)
def test_what_makes_it_another_run_is_refused_by_name(run, tmp_path, changed, said):
    with pytest.raises(UserError) as refused, begin(tiny(changed), tmp_path, str(run.path), pytest.fail):
        pass
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.fixture
def reading(tmp_path) -> Callable[..., RunConfig]:
    """Function overrides -> a run whose prompts, held-out images and reward model are files in `tmp_path`."""
    (tmp_path / "train.txt").write_text("".join(f"prompt {number}\n" for number in range(20)))
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text(f"image {number}")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"weights")
    overrides = ["prompts.kind=txt", f"prompts.path={tmp_path / 'train.txt'}", "evaluate.prompts.kind=images"]
    overrides += [f"evaluate.prompts.folder={tmp_path / 'images'}", f"rewards.clip.path={tmp_path / 'clip'}"]
    survey.cache_clear()
    return lambda *more: tiny(*overrides, *more)


def redraw(folder: Path) -> None:
    Image.new("RGB", (8, 8), (200, 0, 0)).save(folder / "images" / "1.png")


CHANGES = {
    "prompts": lambda folder: (folder / "train.txt").write_text("prompt 0\nanother\n"),
    "evaluate.prompts": redraw,
    "rewards.clip.path": lambda folder: (folder / "clip" / "model.safetensors").write_bytes(b"weighed"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_run_reads_may_not_change_unless_a_setting_allows_it(reading, tmp_path, name):
    run = RunDir.create(tmp_path, "tiny")
    write_text(run.config, dump(reading()))
    checkpoints(reading(), run.checkpoints, 4)
    for file in (tmp_path / "train.txt", tmp_path / "clip" / "model.safetensors"):
        os.utime(file, (0, 0))  # a copy is no change
    with begin(reading(), tmp_path, str(run.path), pytest.fail) as begun:
        assert begun.steps == 4
    CHANGES[name](tmp_path)
    survey.cache_clear()
    for resume in ("auto", str(run.checkpoints / "step_000004")):
        with pytest.raises(UserError) as refused, begin(reading(), tmp_path, resume, lambda note: None):
            pass
        said = str(refused.value)
        assert f"since the run began: {name}; put it back, or set checkpoint.inputs_may_change to true" in said
    notes = []
    with begin(reading("checkpoint.inputs_may_change=true"), tmp_path, str(run.path), notes.append) as begun:
        assert begun.steps == 4 and begun.inputs == read(reading())
    assert notes == [f"resumed although what these settings name has changed since the run began: {name}"]


def test_a_change_anywhere_in_a_large_file_is_a_change_where_it_is_larger_than_a_block(tmp_path):
    file = tmp_path / "weights"
    for size in (0, 1, BLOCK + 1, WHOLE + 1, 3 * WHOLE):
        file.write_bytes(bytes(size))
        seen = digest(file)
        assert seen == digest(file)
        for place in (0, size // 2, size - BLOCK) if size > BLOCK else range(size):
            with file.open("r+b") as content:
                content.seek(place)
                content.write(b"x" * (2 * size // (WHOLE // BLOCK) if size > WHOLE else 1))
            assert digest(file) != seen
            file.write_bytes(bytes(size))


def test_a_folder_is_its_names_and_contents_without_what_is_hidden_or_for_people(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "weights").write_bytes(b"a")
    seen = digest(tmp_path)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "lock").touch()
    assert digest(tmp_path) == seen
    (tmp_path / "part" / "weights").rename(tmp_path / "part" / "other")
    assert digest(tmp_path) != seen


def test_every_kind_says_which_settings_name_its_models():
    for kind in (*REWARDS.values(), *DETECTORS.values(), *BACKBONES.values()):
        named = {"path", "processor", "tokenizer", "encoder", "head", "color_clip"} & set(kind.Config.model_fields)
        assert named <= set(kind.Config.reads) <= set(kind.Config.model_fields), kind


def test_a_run_of_a_version_whose_seeds_draw_other_noise_is_refused_in_one_sentence(run, tmp_path):
    Store(str(run.checkpoints)).write(5, state(tiny(), 5, streams=1).files(), {})
    said = "whose seeds draw other noise; go on with that version, or start"
    with pytest.raises(UserError, match=said) as refused, begin(tiny(), tmp_path, str(run.path), pytest.fail):
        pass
    assert "\n" not in str(refused.value)


def test_other_versions_are_told_of_and_no_obstacle(run, tmp_path):
    old = state(tiny(), 5, versions=software() | {"torch": "1.0"})
    Store(str(run.checkpoints)).write(5, old.files(), {})
    notes = []
    with begin(tiny(), tmp_path, str(run.path), notes.append) as begun:
        assert begun.steps == 5
    assert len(notes) == 1 and "torch 1.0 -> " in notes[0]


@pytest.mark.parametrize("given", ["runs/typo", ".", "step_²", f"step_{'1' * 200}"])
def test_what_is_no_run_is_refused_in_one_sentence(tmp_path, given):
    with (
        pytest.raises(UserError, match="neither a run directory") as refused,
        begin(tiny(), tmp_path, given, print),
    ):
        pass
    assert "\n" not in str(refused.value)


def test_a_run_that_fails_before_it_measured_anything_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), begin(tiny(), tmp_path, None, print):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
