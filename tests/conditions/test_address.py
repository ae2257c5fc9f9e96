import sys

import pytest

from align_cluster.backbones.sd3 import SD3
from align_cluster.conditions import address
from align_cluster.conditions.exploration import E2po

KEYS = {
    "condition": lambda kind, settings: kind(settings).condition_key("a cat"),
    "perturbation": lambda kind, settings: kind(settings).perturbation_key("a cat", E2po(), 0),
}
OWN = """
from align_cluster.backbones.sd3 import SD3

class Own(SD3):
    def embed(self, pipeline, text):
        sequence, pooled = super().embed(pipeline, text)
        return {factor} * sequence, pooled
"""


@pytest.fixture
def fresh(monkeypatch):
    """Function that forgets which code is known, as another process would."""
    address.code_of.cache_clear()
    yield address.code_of.cache_clear
    address.code_of.cache_clear()


@pytest.mark.parametrize("what", KEYS)
def test_records_of_another_version_of_the_code_or_of_a_library_are_not_read(settings, monkeypatch, fresh, what):
    keys = {KEYS[what](SD3, settings)}
    for library in address.LIBRARIES:
        fresh()
        with monkeypatch.context() as other:
            other.setattr(address, "version", lambda name, changed=library: "0.0" if name == changed else "1.0")
            keys.add(KEYS[what](SD3, settings))
    fresh()
    monkeypatch.setattr(address, "CODE_VERSION", address.CODE_VERSION + 1)
    keys.add(KEYS[what](SD3, settings))
    assert len(keys) == len(address.LIBRARIES) + 2


def test_a_backbone_with_an_embedding_of_its_own_reads_no_other_ones_and_a_change_of_it_is_another(
    settings, monkeypatch, fresh, tmp_path
):
    monkeypatch.syspath_prepend(tmp_path)
    keys = [SD3(settings).condition_key("a cat")]
    for name, factor in (("own_one", 1), ("own_two", 2)):
        (tmp_path / f"{name}.py").write_text(OWN.format(factor=factor))
        keys.append(__import__(name).Own(settings).condition_key("a cat"))
        del sys.modules[name]
    assert len(set(keys)) == 3


def test_a_subclass_that_embeds_alike_shares_its_records(settings):
    class Wide(SD3):
        lora_targets = (*SD3.lora_targets, "ff.net.2")

    assert Wide(settings).condition_key("a cat") == SD3(settings).condition_key("a cat")


def test_code_without_a_file_counts_by_its_name(fresh):
    scope = {"__name__": "nowhere"}
    exec("def make(): ...\ndef other(): ...", scope)  # as a notebook does
    keys = [address.address(scope[name], "a") for name in ("make", "other", "make")]
    assert keys[0] == keys[2] != keys[1]
