"""Conditions in Ray's object store: those that a step needs are there, the others as long as the bound allows."""

import logging
import time

import numpy as np
import pytest

from align_cluster.cluster.pool import Pool
from align_cluster.loop.conditions import GIB, ConditionStore, bound
from align_cluster.rollouts.sampler import Sampler
from align_cluster.types import Prompt

from ..inprocess import assert_same_run

SIZE = 13_056  # bytes of one condition of the embedded model: [16, 192] and [192], fp32
PROMPTS = [Prompt(number, f"a photo of {number} red circles") for number in range(40)]


@pytest.fixture(scope="module")
def pool(local_ray, tiny):
    backbone = tiny("nft").backbone
    actor = local_ray.remote(Sampler).options(num_cpus=0.01)
    pool = Pool("sampler", lambda name, index: actor.remote(backbone, 1, name), 2, timeout_s=120)
    pool.wait_until(lambda: len(pool.ready_workers) == pool.size)
    yield pool
    pool.shutdown()


@pytest.fixture
def store(pool, tiny):
    """Function (number of conditions that fit, *overrides) -> ConditionStore."""

    def make(fit: int, *overrides: str) -> ConditionStore:
        return ConditionStore(tiny("nft", f"cluster.condition_cache_gib={fit * SIZE / GIB}", *overrides), pool)

    return make


def used(ray) -> float:
    """Bytes that are taken in the object store. Ray frees an object soon after its last reference."""
    time.sleep(1.0)
    return ray.cluster_resources()["object_store_memory"] - ray.available_resources()["object_store_memory"]


def test_what_goes_out_is_freed_and_comes_back_bit_for_bit(local_ray, store):
    before = used(local_ray)
    conditions = store(10, "rollout.guidance=2")
    conditions.encode(PROMPTS[:4])
    first = local_ray.get([conditions.of(prompt.text) for prompt in PROMPTS[:4]])
    copies = [(one.key, one.sequence.copy(), one.pooled.copy()) for one in first]
    assert first[0].nbytes == SIZE and conditions.key(PROMPTS[0].text) == first[0].key
    del first
    for start in range(4, 40, 4):
        conditions.encode(PROMPTS[start : start + 4])
        assert conditions.recent.nbytes <= 10 * SIZE
    assert used(local_ray) - before < 12 * SIZE  # ten, and their headers, of forty
    with pytest.raises(KeyError, match="a photo of 0 red circles.*call `encode`"):
        conditions.of(PROMPTS[0].text)
    conditions.encode(PROMPTS[:4])
    again = local_ray.get([conditions.of(prompt.text) for prompt in PROMPTS[:4]])
    for (key, sequence, pooled), one in zip(copies, again, strict=True):
        assert one.key == key and one.sequence.tobytes() == sequence.tobytes()
        assert one.pooled.tobytes() == pooled.tobytes()
    assert local_ray.get(conditions.null(2.0)).key and conditions.null(1.0) is None
    del again, one, conditions
    assert used(local_ray) <= before + SIZE


def test_an_evaluation_leaves_the_steps_conditions_where_they_are_if_there_is_room(store):
    conditions = store(12)
    conditions.encode(PROMPTS[:4])
    references = [conditions.of(prompt.text) for prompt in PROMPTS[:4]]
    conditions.encode(PROMPTS[30:38])
    conditions.encode(PROMPTS[:4])
    assert [conditions.of(prompt.text) for prompt in PROMPTS[:4]] == references


def test_what_is_needed_is_all_there_with_one_warning_where_it_exceeds_the_bound(local_ray, store, caplog):
    conditions = store(3)
    with caplog.at_level(logging.WARNING):
        for start in (0, 20):
            conditions.encode(PROMPTS[start : start + 20])
            found = local_ray.get([conditions.of(prompt.text) for prompt in PROMPTS[start : start + 20]])
            assert len({one.key for one in found}) == 20
    said = [record.getMessage() for record in caplog.records if "condition_cache_gib" in record.getMessage()]
    assert len(said) == 1 and "raise it, or take fewer prompts at a time" in said[0]


def test_perturbed_conditions_share_the_bound_and_come_back_bit_for_bit(local_ray, store):
    explored = ("exploration.kind=e2po", "exploration.conditions=3", "exploration.iterations=2")
    conditions = store(8, *explored)
    metrics = conditions.explore(PROMPTS[:2], 0)
    conditions.encode(PROMPTS[:2])
    found = conditions.perturbed_of(PROMPTS[0].text)
    bits = local_ray.get(found.reference).hidden.tobytes()
    key, cosine = found.key, found.cosine
    assert set(metrics) == {"explore/anchor_cosine", "explore/pairwise_cosine"}
    for start in range(2, 20, 2):
        conditions.explore(PROMPTS[start : start + 2], start)
        conditions.encode(PROMPTS[start : start + 2])
        assert conditions.recent.nbytes <= 8 * SIZE
    assert conditions.perturbed_of(PROMPTS[0].text) is None
    assert conditions.explore(PROMPTS[:2], 0) == metrics
    found = conditions.perturbed_of(PROMPTS[0].text)
    assert (found.key, found.cosine, local_ray.get(found.reference).hidden.tobytes()) == (key, cosine, bits)
    assert np.isfinite(found.pairwise)


def test_the_default_bound_is_a_tenth_of_the_free_object_store(local_ray, tiny):
    free = local_ray.available_resources()["object_store_memory"]
    assert bound(tiny("nft").cluster) == pytest.approx(free / 10, rel=0.01)
    assert bound(tiny("nft", "cluster.condition_cache_gib=0.5").cluster) == GIB / 2


@pytest.mark.slow  # a run on Ray and one in this process
def test_a_run_whose_caches_hold_nothing_but_the_step_ends_with_the_same_bits(tiny, train, in_process):
    explored = ("exploration.kind=e2po", "exploration.conditions=2", "exploration.iterations=3", "rollout.chunk=8")
    nothing = ("cluster.condition_cache_gib=1e-9", "cluster.learners=1")
    config = tiny("nft", *nothing, "evaluate.grid_every=1", "rollout.guidance=2", *explored)
    assert_same_run(in_process(config), train(config).path)
