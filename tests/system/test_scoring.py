"""Batches of a reward pool, with real reward workers, and with some that misbehave."""

import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from align_cluster.cluster.actors import make_reward_worker
from align_cluster.cluster.pool import Pool, stream
from align_cluster.cluster.slots import RetryPolicy
from align_cluster.config.plan import RewardPool, derive
from align_cluster.embedded import scene
from align_cluster.embedded.render import render
from align_cluster.loop.scoring import Scoring, batches
from align_cluster.observe.metrics import describe
from align_cluster.observe.sinks import read_jsonl
from align_cluster.rewards.worker import RewardWorker
from align_cluster.types import Failure, Prompt, Scores

from ..drawing import chunk_of

RECORDS = scene.prompts("colors", "held_out")[:6]
IMAGES = render(RECORDS, 1).permute(0, 2, 3, 1).numpy()
CHUNKS = [chunk_of(Prompt(i, r["prompt"], r), (i, i + 100), number=i) for i, r in enumerate(RECORDS)]


class Moody:
    """Scores a chunk by its prompt's number; number 3 takes for ever, and row 1 of number 4 kills the process."""

    def score_chunks(self, prompts: list[list[Prompt]], starts: list[int], *images: np.ndarray) -> list[Scores]:
        rows = [(p.id, row) for part, start in zip(prompts, starts, strict=True) for row, p in enumerate(part, start)]
        if (4, 1) in rows:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600 if any(prompt.id == 3 for part in prompts for prompt in part) else 0)
        return [
            Scores({"a": np.array([float(p.id) for p in part])}, {"a": np.ones(len(part), bool)}, seconds={"a": 0.5})
            for part in prompts
        ]


def score(scoring: Scoring, order: list[int], ray) -> dict[tuple, Scores]:
    """Scores of CHUNKS, drawn in `order`."""
    scoring.begin(CHUNKS)
    for index in order:
        scoring.add(CHUNKS[index], ray.put(np.stack([IMAGES[index]] * 2)))
    return {key: scores for done in stream(scoring.pool) for key, scores in scoring.collect(done).items()}


@pytest.fixture(scope="module")
def pool(local_ray, tiny):
    config = tiny("nft", "rewards.clip.pool.batch=4", "rewards.clip.pool.workers=2")
    plan = derive(config, 2, 0)
    settings = replace(plan.reward_pools[1], cpus=0.01)
    pool = Pool("clip", lambda name, index: make_reward_worker(config, plan, settings, None), 2, 120)
    pool.wait_until(lambda: len(pool.ready_workers) == pool.size)
    yield pool, settings, RewardWorker({"clip": config.rewards["clip"]})
    pool.shutdown()


@pytest.mark.parametrize("ordered", [True, False])
def test_chunks_come_back_with_the_scores_that_they_get_alone(local_ray, pool, ordered):
    pool, settings, alone = pool
    scoring = Scoring(pool, replace(settings, ordered=ordered))
    found = score(scoring, [4, 1, 0, 5, 2, 3], local_ray)
    assert found.keys() == {chunk.id for chunk in CHUNKS}
    for index, chunk in enumerate(CHUNKS):
        here = alone.score(np.stack([IMAGES[index]] * 2), chunk.prompts)
        np.testing.assert_allclose(found[chunk.id].values["clip"], here.values["clip"], atol=1e-5)
    facts = scoring.end()
    assert all(describe(name) and np.isfinite(value) for name, value in facts.items())
    assert facts["scoring/clip/queue"] == 12 and facts["scoring/clip/workers"] == 2
    assert 0 < facts["scoring/clip/p50"] <= facts["scoring/clip/p95"] and facts["reward/clip/images_per_s"] > 0


def test_ordered_batches_are_the_same_whichever_chunk_is_drawn_first(local_ray, pool):
    pool, settings, _ = pool
    scoring, seen = Scoring(pool, settings), []
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0]):
        found = score(scoring, order, local_ray)
        assert scoring.fills == [1.0] * 3
        seen.append(np.concatenate([found[chunk.id].values["clip"] for chunk in CHUNKS]))
    np.testing.assert_array_equal(*seen)


def test_a_batch_waits_for_all_of_its_chunks_and_only_for_them(local_ray, pool):
    pool, settings, _ = pool
    scoring = Scoring(pool, settings)
    scoring.begin(CHUNKS)
    for index, calls in ((0, 0), (2, 0), (3, 1), (4, 1), (1, 2), (5, 3)):
        scoring.add(CHUNKS[index], local_ray.put(np.stack([IMAGES[index]] * 2)))
        assert len(scoring.fills) == calls
    assert len([scoring.collect(done) for done in stream(pool)]) == 3


def test_chunks_are_never_cut_and_never_over_the_size_together():
    assert [[c.number for c in batch] for batch in batches(CHUNKS, 5)] == [[0, 1], [2, 3], [4, 5]]
    assert [[c.number for c in batch] for batch in batches(CHUNKS, 1)] == [[0], [1], [2], [3], [4], [5]]
    assert [[c.number for c in batch] for batch in batches(CHUNKS, 8)] == [[0, 1, 2, 3], [4, 5]]


def test_a_worker_scores_large_chunks_in_parts(pool):
    _, _, alone = pool
    small = RewardWorker({"clip": alone.rewards["clip"].config}, batch=2)
    prompts = [chunk.prompts[0] for chunk in CHUNKS[:5]]
    parts, whole = small.score(IMAGES[:5], prompts), alone.score(IMAGES[:5], prompts)
    np.testing.assert_allclose(parts.values["clip"], whole.values["clip"], atol=1e-5)
    assert parts.valid["clip"].all() and small.score(IMAGES[:0], []).valid["clip"].shape == (0,)


def test_a_scorer_that_hangs_or_dies_costs_the_images_that_cause_it_a_typed_failure_and_the_others_nothing(
    local_ray, by_value
):
    actor = local_ray.remote(Moody).options(num_cpus=0)
    pool = Pool("reward a", lambda name, index: actor.remote(), 1, 120, 2, RetryPolicy(1.5, 2))
    scoring = Scoring(pool, RewardPool("a", ("a",), workers=1, most=2, cpus=0.0))
    found = score(scoring, range(6), local_ray)
    for chunk in CHUNKS:
        if chunk.number == 3:
            message = found[chunk.id].failures["a"].message
            assert found[chunk.id].failures == {"a": Failure("timeout", message, (0, 1))} and "in 1.5 s" in message
            assert np.isnan(found[chunk.id].values["a"]).all() and not found[chunk.id].valid["a"].any()
        elif chunk.number == 4:
            message = found[chunk.id].failures["a"].message
            assert found[chunk.id].failures == {"a": Failure("unavailable", message, (1,))}
            np.testing.assert_array_equal(found[chunk.id].values["a"], [4, np.nan])
        else:
            assert found[chunk.id].failures == {} and (found[chunk.id].values["a"] == chunk.number).all()
    assert pool.lost == 2 + 2 + 2 + 1  # the tries of both chunks, and then of the halves that fail
    pool.shutdown()


def test_a_chunk_that_is_drawn_again_is_scored_by_whoever_lacks_its_score_and_once(local_ray, by_value):
    actor = local_ray.remote(Moody).options(num_cpus=0)
    pool = Pool("reward a", lambda name, index: actor.remote(), 1, 120, 1, RetryPolicy(60, 2))
    scoring = Scoring(pool, RewardPool("a", ("a",), workers=1, most=2, cpus=0.0))
    first, second = CHUNKS[:2]
    scoring.begin([first, second])
    scoring.add(first, IMAGES[:2])
    scoring.add(first, IMAGES[:2])  # it is with a worker already
    (done,) = stream(pool)
    ((missed, _),) = scoring.withdraw(done)
    assert missed == first and not pool.busy  # as if its images had been missing
    scoring.add(second, IMAGES[:2])
    scoring.add(first, IMAGES[:2])
    scores = {key: found for done in stream(pool) for key, found in scoring.collect(done).items()}
    assert scores.keys() == {first.id, second.id}
    scoring.add(first, IMAGES[:2])  # another pool lacked its score, this one does not
    assert not pool.busy
    pool.shutdown()


def test_a_backlog_calls_more_workers(local_ray, by_value):
    actor = local_ray.remote(Moody).options(num_cpus=0)
    pool = Pool("reward a", lambda name, index: actor.remote(), 1, 120, 2, RetryPolicy(60, 2))
    scoring = Scoring(pool, RewardPool("a", ("a",), workers=1, most=2, cpus=0.0))
    pool.wait_until(lambda: len(pool.ready_workers) == pool.size)
    quick = [chunk_of(Prompt(0, "quick"), (1, 2), number=number) for number in range(6)]
    scoring.begin(quick)
    for chunk, workers in zip(quick, (1, 1, 1, 1, 2, 2), strict=True):
        scoring.add(chunk, IMAGES[:2])
        assert len(pool.workers) == workers
    list(map(scoring.collect, stream(pool)))
    pool.shutdown()


@pytest.mark.slow
def test_batches_of_rewards_in_a_run_end_in_the_same_lora_for_one_and_two_samplers(tiny, train):
    """Of the same chunks, whoever draws first; and the run writes how scoring kept up."""
    own = ("rewards.clip.pool.batch=8", "rewards.clip.pool.cpus=0.02", "rollout.chunk=2")
    one, two = (train(tiny("nft", *own, f"cluster.samplers={samplers}")) for samplers in (1, 2))
    assert one.summary["lora_checksum"] == two.summary["lora_checksum"]
    row = read_jsonl(two.path / "metrics.jsonl")[-1]
    assert row["scoring/clip/batch_fill"] == 1.0 and row["scoring/shared/batch_fill"] == 1.0
    assert {"scoring/clip/p95", "scoring/shared/queue", "reward/geneval/images_per_s"} <= row.keys()
