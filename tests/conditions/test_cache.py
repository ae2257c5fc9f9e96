import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from align_cluster.backbones.sd3 import SD3
from align_cluster.conditions.cache import LOOK, SLACK, VARIABLE, Cache, Clearance, allowed, cached, default_folder
from align_cluster.conditions.exploration import E2po
from align_cluster.errors import UserError
from align_cluster.types import Condition, Perturbation

WRITER = """
import sys
from pathlib import Path
import numpy as np
from align_cluster.conditions.cache import Cache
from align_cluster.types import Condition, Perturbation
folder, value = Path(sys.argv[1]), float(sys.argv[2])
for _ in range(200):
    Cache(folder, Condition).put(Condition("abcd", np.full((50, 64), value), np.full(64, value)))
    variants = np.full((3, 50, 64), value), np.full((3, 64), value), np.full(3, value), value
    Cache(folder, Perturbation).put(Perturbation("abcd", *variants))
"""


def record(kind: type, key: str = "0123ab", seed: int = 0) -> Condition | Perturbation:
    rng = np.random.default_rng(seed)
    shapes = {"sequence": (5, 8), "hidden": (3, 5, 8), "pooled": (3,), "cosines": (3,)}
    names = [field.name for field in fields(kind)]
    arrays = {name: rng.standard_normal(shapes[name]).astype(np.float32) for name in names if name in shapes}
    return kind(key, **arrays, **({"pairwise": rng.random()} if kind is Perturbation else {}))


def assert_same(found: Condition | Perturbation, stored: Condition | Perturbation) -> None:
    assert type(found) is type(stored) and found.key == stored.key
    for name, value in vars(stored).items():
        assert type(getattr(found, name)) is type(value)
        if isinstance(value, np.ndarray):
            assert getattr(found, name).dtype == value.dtype
            assert getattr(found, name).tobytes() == value.tobytes()
        elif name != "key":
            np.testing.assert_array_equal(getattr(found, name), value)


@pytest.fixture(params=[Condition, Perturbation])
def kind(request):
    return request.param


def test_a_record_comes_back_bit_for_bit(tmp_path, kind):
    cache, stored = Cache(tmp_path, kind), record(kind)
    assert cache.get(stored.key) is None
    cache.put(stored)
    assert_same(Cache(tmp_path, kind).get(stored.key), stored)


def test_a_lone_variant_without_pairs_comes_back_too(tmp_path):
    stored = Perturbation("0123ab", np.ones((1, 5, 8)), np.ones((1, 3)), np.ones(1), float("nan"))
    Cache(tmp_path, Perturbation).put(stored)
    assert_same(Cache(tmp_path, Perturbation).get("0123ab"), stored)


def test_kinds_do_not_meet_under_one_key(tmp_path):
    for kind in (Condition, Perturbation):
        Cache(tmp_path, kind).put(record(kind))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conditions", "perturbations"]
    for kind in (Condition, Perturbation):
        assert_same(Cache(tmp_path, kind).get("0123ab"), record(kind))
    (other,) = (tmp_path / "perturbations").rglob("*.npz")
    other.write_bytes(next((tmp_path / "conditions").rglob("*.npz")).read_bytes())
    assert Cache(tmp_path, Perturbation).get("0123ab") is None  # a whole file of another kind


def test_a_later_write_replaces_an_earlier_one_and_leaves_no_temporary_file(tmp_path, kind):
    cache = Cache(tmp_path, kind)
    cache.put(record(kind, seed=0))
    cache.put(record(kind, seed=1))
    assert_same(cache.get("0123ab"), record(kind, seed=1))
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".npz"]


def test_a_file_that_was_cut_off_is_treated_as_absent(tmp_path, kind):
    cache = Cache(tmp_path, kind)
    cache.put(record(kind))
    (path,) = tmp_path.rglob("*.npz")
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert cache.get("0123ab") is None, size
    path.write_bytes(whole)
    assert cache.get("0123ab") is not None


def test_a_file_with_a_changed_byte_is_absent_or_whole_and_never_other_numbers(tmp_path, kind):
    cache, stored = Cache(tmp_path, kind), record(kind)
    cache.put(stored)
    (path,) = tmp_path.rglob("*.npz")
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        found = cache.get(stored.key)
        if found is not None:  # dates and the like do not matter
            assert_same(found, stored)


@pytest.mark.parametrize("junk", [b"", b"not a zip", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_junk_is_treated_as_absent_and_can_be_replaced(tmp_path, junk):
    cache = Cache(tmp_path, Condition)
    cache.put(record(Condition))
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(junk)
    assert cache.get("0123ab") is None
    cache.put(record(Condition))
    assert cache.get("0123ab") is not None


def test_two_processes_that_write_one_key_never_show_a_mixture(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), value]) for value in ("1", "2")]
    seen = {Condition: 0, Perturbation: 0}
    while any(writer.poll() is None for writer in writers) or not all(seen.values()):
        for kind in seen:
            found = Cache(tmp_path, kind).get("abcd")
            if found is not None:
                seen[kind] += 1
                values = [np.ravel(value) for name, value in vars(found).items() if name != "key"]
                assert len(np.unique(np.concatenate(values))) == 1
    assert [writer.wait() for writer in writers] == [0, 0] and all(seen.values())
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".npz"] * 2


def bounded(monkeypatch, files: int) -> None:
    """Let a cache take as many files of `small`."""
    monkeypatch.setenv(VARIABLE, str(files * 4096 / 2**30))


def small(number: int) -> Condition:
    return record(Condition, f"{number % 7}{number:05d}", number)


def on_disk(folder: Path) -> set[int]:
    """Numbers of the conditions that are there."""
    return {int(path.stem[1:]) for path in folder.glob("conditions/*/*.npz")}


def age(folder: Path, seconds: float) -> None:
    """Make every file look as if it had been used that much earlier."""
    for path in folder.rglob("*.npz"):
        old = path.stat()
        os.utime(path, (old.st_atime - seconds, old.st_mtime - seconds))


def test_the_records_used_longest_ago_make_room_for_new_ones(tmp_path, monkeypatch):
    bounded(monkeypatch, 100)
    cache = Cache(tmp_path, Condition)
    for number in range(100):
        cache.put(small(number))
    age(tmp_path, 100)
    used = set(range(0, 100, 5))
    for number in used:
        assert_same(cache.get(small(number).key), small(number))
    age(tmp_path, 100)
    for number in range(100, 160):
        cache.put(small(number))
    left = on_disk(tmp_path)
    assert used | set(range(100, 160)) <= left and len(left) <= 102  # two more are written between two looks
    for number in left:
        assert_same(cache.get(small(number).key), small(number))


def test_a_cache_stays_within_its_bound_whatever_its_kinds_and_however_much_is_written(tmp_path, monkeypatch):
    bounded(monkeypatch, 50)
    caches = [Cache(tmp_path, kind) for kind in (Condition, Perturbation)]
    for number in range(600):
        caches[number % 2].put(record(caches[number % 2].kind, f"{number:06d}"))
        assert number < 60 or 45 <= len(list(tmp_path.rglob("*.npz"))) <= 51


def test_the_folder_is_looked_through_once_for_many_writes(tmp_path, monkeypatch):
    looks, clear = [], Clearance.clear
    monkeypatch.setattr(Clearance, "clear", lambda self: looks.append(0) or clear(self))
    bounded(monkeypatch, 1000)
    for number in range(1500):
        Cache(tmp_path, Condition).put(small(number))  # the count is the process's, not the object's
    assert 1 < len(looks) <= 1500 / (LOOK * 1000) + 1
    assert (1 - SLACK) * 1000 <= len(on_disk(tmp_path)) <= (1 + LOOK) * 1000 + 1


def test_a_file_of_somebody_else_is_never_deleted(tmp_path, monkeypatch):
    bounded(monkeypatch, 5)
    others = [
        "mine.npz",
        "conditions/notes.txt",
        "conditions/conditions.npz",
        "conditions/00/mine.npz",
        "images/00/00a.npz",
    ]
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(100_000))
    for number in range(40):
        Cache(tmp_path, Condition).put(small(number))
    assert all((tmp_path / name).stat().st_size == 100_000 for name in others)


def test_what_a_killed_writer_left_goes_after_an_hour_and_what_is_being_written_stays(tmp_path, monkeypatch):
    bounded(monkeypatch, 5)
    folder = tmp_path / "conditions" / "00"
    folder.mkdir(parents=True)
    left, current = folder / ".0123.npz", folder / ".4567.npz"
    left.write_bytes(bytes(100_000))
    age(tmp_path, 4000)
    current.write_bytes(bytes(100_000))
    for number in range(3):
        Cache(tmp_path, Condition).put(small(number))
    assert not left.exists() and current.exists() and on_disk(tmp_path) >= {1, 2}


def test_several_processes_share_a_bounded_folder_and_see_whole_records_only(tmp_path):
    script = """
import sys
from pathlib import Path
import numpy as np
from align_cluster.conditions.cache import Cache
from align_cluster.types import Condition
cache, seen, rng = Cache(Path(sys.argv[1]), Condition), 0, np.random.default_rng(int(sys.argv[2]))
for number in rng.integers(0, 300, 1500):
    found = cache.get(f"{number:06d}")
    if found is None:
        cache.put(Condition(f"{number:06d}", np.full((5, 8), number), np.full(3, number)))
    else:
        seen += 1
        assert (found.sequence == number).all() and (found.pooled == number).all()
print(seen)
"""
    command, env = [sys.executable, "-c", script, str(tmp_path)], os.environ | {VARIABLE: str(100 * 4096 / 2**30)}
    running = [
        subprocess.Popen([*command, seed], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in "123"
    ]
    for process in running:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert int(out) > 100  # records that were found
    names = [path.name for path in tmp_path.rglob("*.npz")]
    assert 80 <= len(names) <= 110 and not any(name.startswith(".") for name in names)


def test_the_bound_is_the_users_choice_or_a_share_of_the_free_disk(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1.5")
    assert allowed(tmp_path, 0) == 1.5 * 2**30
    monkeypatch.delenv(VARIABLE)
    free = shutil.disk_usage(tmp_path).free
    assert allowed(tmp_path, 0) == pytest.approx(min(0.1 * free, 20 * 2**30), rel=0.05)
    assert allowed(tmp_path, 10**15) == 20 * 2**30  # what the cache holds counts as free


@pytest.mark.parametrize("wrong", ["0", "-1", "much", "nan", ""])
def test_a_bound_that_is_no_size_is_one_sentence(tmp_path, monkeypatch, wrong):
    monkeypatch.setenv(VARIABLE, wrong)
    with pytest.raises(UserError, match=f"ALIGN_CLUSTER_CACHE_GIB is {wrong!r}: set it to the GiB"):
        Cache(tmp_path, Condition).put(small(0))


def test_only_what_is_missing_or_damaged_is_made_once_and_in_one_call(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("ALIGN_CLUSTER_CACHE", str(tmp_path))
    calls = []

    def make(texts: list[str]) -> list[Condition | Perturbation]:
        calls.append(texts)
        return [record(kind, f"key{text}", seed=int(text)) for text in texts]

    def get(*texts: str) -> None:
        found = cached(kind, list(texts), lambda text: f"key{text}", make)
        for text, one in zip(texts, found, strict=True):
            assert_same(one, record(kind, f"key{text}", seed=int(text)))

    get("1", "2", "1")
    get("2", "3", "1", "4")
    get("4", "1")
    (damaged,) = tmp_path.rglob("key1.npz")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    get("1", "2")
    get("1")
    assert calls == [["1", "2"], ["3", "4"], ["1"]]


def test_the_folder_is_the_users_choice_or_their_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGN_CLUSTER_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.delenv("ALIGN_CLUSTER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "align_cluster"


def test_a_key_changes_with_everything_that_an_encoding_depends_on(tmp_path, settings):
    text = "a photo of a red circle"
    other = tmp_path / "pipeline"
    (other / "text_encoder").mkdir(parents=True)
    (other / "text_encoder" / "model.safetensors").write_bytes(b"1234")
    first = SD3(settings).condition_key(text)
    elsewhere = SD3(settings.model_copy(update={"path": str(other)})).condition_key(text)
    keys = [
        first,
        elsewhere,
        SD3(settings).condition_key(text + " "),
        SD3(settings).condition_key(""),
        SD3(settings.model_copy(update={"t5": False})).condition_key(text),
        SD3(settings.model_copy(update={"max_sequence_length": 77})).condition_key(text),
        SD3(settings.model_copy(update={"path": "owner/name"})).condition_key(text),
    ]
    (other / "text_encoder" / "model.safetensors").write_bytes(b"12345")
    keys.append(SD3(settings.model_copy(update={"path": str(other)})).condition_key(text))
    assert len(set(keys)) == len(keys)
    assert SD3(settings).condition_key(text) == first and len(first) == 32


def test_a_key_does_not_change_with_what_an_encoding_does_not_depend_on(settings):
    text = "a photo of a red circle"
    wide = settings.model_copy(update={"height": 96, "lora": settings.lora.model_copy(update={"rank": 8})})
    assert SD3(wide).condition_key(text) == SD3(settings).condition_key(text)


def test_a_perturbations_key_changes_with_everything_that_it_depends_on(tmp_path, settings):
    text = "a photo of a red circle"
    other = tmp_path / "pipeline"
    (other / "text_encoder").mkdir(parents=True)
    (other / "text_encoder" / "model.safetensors").write_bytes(b"1234")
    there = settings.model_copy(update={"path": str(other)})
    changes = [
        {"conditions": 5},
        {"mu": 0.7},
        {"margin": 0.02},
        {"diversity": 30.0},
        {"iterations": 299},
        {"lr": 2e-3},
        {"init": 0.02},
        {"bound": "inf"},
        {"radius": 0.04},
        {"embedding": "pooled"},
        {"anchor": False},
        {"encoders": "both"},
    ]
    assert {name for change in changes for name in change} == set(E2po.model_fields) - {"kind"} - E2po.drawing
    backbone = SD3(settings)
    keys = [backbone.perturbation_key(text, E2po(**change), 0) for change in ({}, *changes)]
    keys += [backbone.perturbation_key(text, E2po(), 1), backbone.perturbation_key("", E2po(), 0)]
    keys.append(SD3(there).perturbation_key(text, E2po(), 0))
    (other / "text_encoder" / "model.safetensors").write_bytes(b"12345")
    keys.append(SD3(there).perturbation_key(text, E2po(), 0))
    (other / "tokenizer").mkdir()
    (other / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    keys.append(SD3(there).perturbation_key(text, E2po(), 0))
    assert len(set(keys)) == len(keys) and {len(key) for key in keys} == {32}
    # The other encoders, the image, the adapters and phase 2 have no part in it.
    (other / "text_encoder_2").mkdir()
    (other / "text_encoder_2" / "model.safetensors").write_bytes(b"1")
    same = there.model_copy(update={"t5": False, "height": 96, "lora": settings.lora.model_copy(update={"rank": 8})})
    later = E2po(rho=0.9, schedule="static", clock="time", update="perturbed", learned="each_time")
    assert SD3(same).perturbation_key(text, later, 0) == keys[-1]


def test_a_sampler_learns_a_prompt_once_and_another_one_reads_it(tmp_path, monkeypatch, settings):
    from align_cluster.rollouts.sampler import Sampler

    monkeypatch.setenv("ALIGN_CLUSTER_CACHE", str(tmp_path))
    config, texts = E2po(iterations=3), ["a red circle", "", "two blue squares", "a red circle"]
    learned = Sampler(settings).perturb(texts, config, 7)
    assert [one.key for one in learned] == [SD3(settings).perturbation_key(text, config, 7) for text in texts]
    reader = Sampler(settings)
    reader.backbone.perturb = None  # whoever learns again, fails
    for one, other in zip(reader.perturb(texts[::-1], config, 7)[::-1], learned, strict=True):
        assert_same(one, other)
    (alone,) = Sampler(settings).backbone.perturb(texts[2:3], config, 7)
    assert_same(alone, learned[2])
