"""Samples that count in nothing, in steps of a run in this process: real samplers, rewards, credit and learner."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from align_cluster.learner.batching import TrainingChunk, make_micro_batches, rank_work, reduce_metrics
from align_cluster.loop.advantages import AdvantageEstimator
from align_cluster.loop.clock import Clock
from align_cluster.loop.requests import plan_chunks, training_request
from align_cluster.loop.rollouts import DrawnChunk
from align_cluster.loop.summary import step_metrics
from align_cluster.prompts import PROMPTS
from align_cluster.rewards.base import Result, RewardSection
from align_cluster.rollouts import denoise
from align_cluster.rollouts.sampler import Sampler
from align_cluster.types import Prompt, Record

from ..inprocess import Workers, own_environment


class Picky:
    """Scores an image by its brightness, and breaks on a batch that holds one that is dark enough."""

    limit = 0.0
    config = RewardSection(on_failure={"retries": 0})

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> Result:
        bright = images.mean((1, 2, 3), dtype=np.float64)
        if (bright <= self.limit).any():
            raise ValueError("too dark")
        return Result(bright, np.ones(len(images), bool))


@pytest.fixture(scope="module")
def workers(tiny):
    """Function kind -> what a run of that algorithm works with, made once; chunks of 3 hold rows of both prompts."""
    made: dict[str, Workers] = {}

    def get(kind: str) -> Workers:
        if kind not in made:
            made[kind] = Workers(tiny(kind, "rollout.chunk=3", "learner.ema=0"))
        return made[kind]

    with own_environment():
        yield get


@pytest.fixture
def spoilt(monkeypatch) -> set[int]:
    """Seeds whose rollouts start from NaN."""
    sound, seeds_of = denoise.starting_noise, set()

    def noise(seeds, shape):
        x = sound(seeds, shape)
        x[[seed in seeds_of for seed in seeds]] = torch.nan
        return x

    monkeypatch.setattr(denoise, "starting_noise", noise)
    return seeds_of


def drawn_by(samplers: int, own: Workers, step: int = 0) -> list[DrawnChunk]:
    """The chunks of a step, drawn in turn by so many samplers with the base's weights, and scored."""
    prompts = PROMPTS[own.config.prompts.kind](own.config.prompts).load()
    chunks = plan_chunks(own.config, prompts, step)
    own.encode([text for chunk in chunks for text in chunk.texts])
    crew, request = [Sampler(own.config.backbone) for _ in range(samplers)], training_request(own.config, step, 0)
    found = []
    for number, chunk in enumerate(chunks):
        conditions = {text: own.conditions[text] for text in chunk.texts}
        info, images, record = crew[number % samplers].draw(chunk, conditions, None, request)
        found.append(DrawnChunk(info, images, record, own.rewards.score(images, chunk.prompts), request))
    return found


@pytest.mark.parametrize("kind", ["nft", "grpo"])
def test_masked_samples_are_the_same_for_one_two_and_three_samplers_and_the_others_train(workers, spoilt, kind):
    """One sample of the step is not finite, and one image breaks a reward."""
    own, picky = workers(kind), Picky()
    own.rewards.rewards["clip"] = picky
    before = drawn_by(1, own)
    assert [len(item.chunk) for item in before] == [2, 3, 3]  # the second one has rows of both groups
    darkest = np.sort(np.concatenate([item.scores.values["clip"] for item in before]))
    spoilt.add(before[1].chunk.noises[1])
    picky.limit = darkest[0]
    if before[1].scores.values["clip"][1] == darkest[0]:
        picky.limit = darkest[1]
    found = []
    for samplers in (1, 2, 3):
        drawn = drawn_by(samplers, own)
        found.append((drawn, AdvantageEstimator(own.config).assign(drawn)))
    for drawn, credit in found[1:]:
        np.testing.assert_array_equal(credit.advantages, found[0][1].advantages)
        np.testing.assert_array_equal(credit.valid, found[0][1].valid)
        for ours, theirs in zip(drawn, found[0][0], strict=True):
            assert ours.info.non_finite == theirs.info.non_finite and ours.scores.failures == theirs.scores.failures
            np.testing.assert_array_equal(ours.images, theirs.images)
            np.testing.assert_array_equal(ours.record.x0, theirs.record.x0)
    drawn, credit = found[0]
    assert [item.info.non_finite for item in drawn] == [(), (1,), ()] and (~credit.valid).sum() == 2
    assert sum(item.scores.failures["clip"].images for item in drawn if item.scores.failures) == 1
    trained = own.update(0, drawn, credit)
    assert trained["skipped"].mean == 0 and trained["grad_norm"].largest > 0 and np.isfinite(trained["loss"].mean)
    clock = Clock()
    clock.next_step(1)
    row = step_metrics(own.config, drawn, credit, trained, clock, own.publish("behaviour"))
    assert row["rollout/non_finite"] == 1 and row["group/masked"] == 2 / 8 and row["reward/clip/failed"] == 1


@pytest.mark.parametrize("kind", ["nft", "grpo"])
def test_a_masked_sample_adds_nothing_to_the_loss_and_the_gradient(workers, kind):
    """An update of a chunk with one is the update of the chunk without it, whatever its record holds."""
    own = workers(kind)
    snapshot, (_, item, _) = own.learner.state(), drawn_by(1, own)
    advantages, found = np.array([1.5, 0.0, -0.5], np.float32), []
    for rows, masked, factor in (([0, 2], [], 1), ([0, 1, 2], [1], 1), ([0, 1, 2], [1], 0), ([0, 1, 2], [1], 50)):
        record = taken(item.record, rows)
        for name in ("x0", "before", "after", "log_probs") if masked else ():
            if (array := getattr(record, name)) is not None:
                array[1] *= factor
        valid = np.array([row not in masked for row in rows])
        pieces = make_micro_batches([advantages[rows]], [valid], bounds=[0, len(rows)], size=len(rows))
        work = rank_work(0, pieces, [TrainingChunk(record, own.conditions)])
        own.learner.restore(snapshot)
        found.append(reduce_metrics([own.learner.update(work)]))
    for other in found[1:]:
        assert other["skipped"].mean == other["empty"].mean == 0
        assert other["loss"].mean == pytest.approx(found[0]["loss"].mean, rel=1e-4)
        assert other["grad_norm"].largest == pytest.approx(found[0]["grad_norm"].largest, rel=1e-3)
    assert found[0]["grad_norm"].largest > 1e-4


def taken(record: Record, rows: list[int]) -> Record:
    """A copy of some rows of a record."""
    arrays = {name: getattr(record, name) for name in ("x0", "indices", "before", "after", "log_probs", "means")}
    chunk = replace(record.chunk, rows=tuple(record.chunk.rows[row] for row in rows))
    return replace(record, chunk=chunk, **{name: None if a is None else a[rows] for name, a in arrays.items()})
