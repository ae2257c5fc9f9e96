import subprocess
import sys

import numpy as np
import pytest

from align_cluster.backbones.sd3 import SD3
from align_cluster.conditions.cache import ConditionCache, default_folder
from align_cluster.types import Condition

WRITER = """
import sys
from pathlib import Path
import numpy as np
from align_cluster.conditions.cache import ConditionCache
from align_cluster.types import Condition
cache = ConditionCache(Path(sys.argv[1]))
for _ in range(200):
    cache.put(Condition("abcd", np.full((50, 64), float(sys.argv[2])), np.full(64, float(sys.argv[2]))))
"""


def condition(key: str = "0123ab", seed: int = 0) -> Condition:
    rng = np.random.default_rng(seed)
    sequence, pooled = rng.standard_normal((5, 8)).astype(np.float32), rng.standard_normal(3).astype(np.float32)
    return Condition(key, sequence, pooled)


def test_a_condition_comes_back_bit_for_bit(tmp_path):
    cache, stored = ConditionCache(tmp_path), condition()
    assert cache.get(stored.key) is None
    cache.put(stored)
    found = ConditionCache(tmp_path).get(stored.key)
    assert found.key == stored.key and found.sequence.dtype == found.pooled.dtype == np.float32
    assert found.sequence.tobytes() == stored.sequence.tobytes() and found.pooled.tobytes() == stored.pooled.tobytes()


def test_a_later_write_replaces_an_earlier_one_and_leaves_no_temporary_file(tmp_path):
    cache = ConditionCache(tmp_path)
    cache.put(condition(seed=0))
    cache.put(condition(seed=1))
    np.testing.assert_array_equal(cache.get("0123ab").sequence, condition(seed=1).sequence)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".npz"]


def test_a_file_that_was_cut_off_is_treated_as_absent(tmp_path):
    cache = ConditionCache(tmp_path)
    cache.put(condition())
    (path,) = tmp_path.rglob("*.npz")
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert cache.get("0123ab") is None, size
    path.write_bytes(whole)
    assert cache.get("0123ab") is not None


def test_a_file_with_a_changed_byte_is_absent_or_whole_and_never_other_numbers(tmp_path):
    cache, stored = ConditionCache(tmp_path), condition()
    cache.put(stored)
    (path,) = tmp_path.rglob("*.npz")
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        found = cache.get(stored.key)
        if found is not None:  # dates and the like do not matter
            np.testing.assert_array_equal(found.sequence, stored.sequence)
            np.testing.assert_array_equal(found.pooled, stored.pooled)


@pytest.mark.parametrize("junk", [b"", b"not a zip", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_junk_is_treated_as_absent_and_can_be_replaced(tmp_path, junk):
    cache = ConditionCache(tmp_path)
    cache.put(condition())
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(junk)
    assert cache.get("0123ab") is None
    cache.put(condition())
    assert cache.get("0123ab") is not None


def test_two_processes_that_write_one_key_never_show_a_mixture(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), value]) for value in ("1", "2")]
    cache, seen = ConditionCache(tmp_path), 0
    while any(writer.poll() is None for writer in writers) or not seen:
        found = cache.get("abcd")
        if found is not None:
            seen += 1
            assert len(np.unique(np.concatenate([found.sequence.ravel(), found.pooled]))) == 1
    assert [writer.wait() for writer in writers] == [0, 0] and seen
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".npz"]


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
