import pytest

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.grpo import GRPO
from align_cluster.observe.metrics import LEARNER, METRICS, declared, describe
from align_cluster.types import Metric


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
    for metric in declared():
        assert metric.meaning
        assert describe(metric.pattern) == metric


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_what_a_loss_returns_has_one_meaning_and_no_name_of_the_learners(kind):
    metrics = ALGORITHMS[kind].metrics
    assert metrics and all(describe(metric.pattern) == metric for metric in metrics)
    general = {name for metric in METRICS for name in (metric.pattern, metric.source)}
    assert not general & {name for metric in metrics for name in (metric.pattern, metric.source)}
    sources = [metric.source for metric in (*LEARNER, *metrics)]
    assert len(sources) == len(set(sources))


def test_an_algorithm_that_is_put_into_the_table_later_brings_its_metrics(monkeypatch):
    class Entropic(GRPO):
        metrics = (*GRPO.metrics, Metric("train/entropy", "nats", "entropy of the steps"))

    with pytest.raises(ValueError, match="'train/entropy' is not declared"):
        describe("train/entropy")
    monkeypatch.setitem(ALGORITHMS, "entropic", Entropic)
    assert describe("train/entropy").unit == "nats"
