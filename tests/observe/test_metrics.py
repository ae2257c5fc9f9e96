import pytest

from align_cluster.observe.metrics import METRICS, describe


def test_the_contract_names_are_declared_with_their_units():
    units = {
        "reward/geneval/mean": "score",
        "reward/geneval/two_object": "score",
        "group/zero_std_ratio": "fraction",
        "time/rollout": "s",
        "weights/bytes": "bytes",
        "throughput/images_per_s": "images/s",
        "lr": "",
    }
    assert {name: describe(name).unit for name in units} == units


def test_the_special_case_wins_over_the_general_pattern():
    assert describe("time/step").pattern == "time/step"
    assert describe("time/update").pattern == "time/<stage>"
    assert describe("reward/clip/mean").pattern == "reward/<name>/mean"


@pytest.mark.parametrize("name", ["train/los", "reward/geneval", "reward//mean", "time/a/b", "", "Lr"])
def test_an_undeclared_name_is_an_error(name):
    with pytest.raises(ValueError, match="not declared"):
        describe(name)


def test_a_typo_is_told_the_nearest_name():
    with pytest.raises(ValueError, match="'train/grad_norm'"):
        describe("train/gradnorm")


def test_every_declaration_has_a_meaning_and_is_found_under_its_own_pattern():
    for metric in METRICS:
        assert metric.meaning
        assert describe(metric.pattern) is metric
