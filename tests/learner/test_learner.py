import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from align_cluster.algorithms.ppo import PPO
from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import MicroBatch, TrainingChunk, rank_work, reduce_metrics
from align_cluster.learner.worker import Learner
from align_cluster.types import Prompt, Record

from ..drawing import chunk_of

STEPS = 10


def learner(updates_per_step: int = 2, **optimizer) -> Learner:
    """A learner that has settings and a count of updates, but no engine."""
    config = RunConfig.model_validate(
        {
            "name": "test",
            "steps": STEPS,
            "backbone": {"kind": "sd3"},
            "prompts": {"kind": "embedded"},
            "rewards": {"geneval": {"kind": "geneval"}},
            "algorithm": {"kind": "nft"},
            "optimizer": {"lr": 1e-3, **optimizer},
            "learner": {"updates_per_step": updates_per_step},
            "evaluate": {"prompts": {"kind": "embedded", "split": "held_out"}},
        }
    )
    made = object.__new__(Learner)
    made.setup, made.updates = config.learner_setup, 0
    return made


def rates(made: Learner, count: int) -> list[float]:
    values = []
    for made.updates in range(count):
        values.append(made.learning_rate())
    return values


def test_a_constant_rate_is_constant():
    assert set(rates(learner(), 20)) == {1e-3}


def test_a_linear_rate_is_flat_then_falls_evenly_to_its_floor():
    values = rates(learner(schedule="linear", flat=0.25, final=0.05), 20)
    assert values[:5] == [1e-3] * 5
    falling = [value for value in values[5:] if value > 0.05e-3]
    differences = [b - a for a, b in zip(falling, falling[1:], strict=False)]
    assert differences == pytest.approx([differences[0]] * len(differences)) and differences[0] < 0
    assert values[5] == pytest.approx(1e-3) and values[19] == pytest.approx(1e-3 * max(0.05, 0.05 / 0.75))
    assert min(values) >= 0.05e-3 and values == sorted(values, reverse=True)


def test_the_rate_depends_on_progress_and_not_on_how_it_is_cut_into_updates():
    settings = {"schedule": "linear", "flat": 0.3, "final": 0.1}
    coarse, fine = rates(learner(1, **settings), 10), rates(learner(4, **settings), 40)
    assert fine[::4] == pytest.approx(coarse)


@pytest.mark.parametrize(("flat", "final"), [(0.0, 0.0), (1.0, 0.5), (0.0, 1.0)])
def test_the_ends_of_a_schedules_settings_are_finite(flat, final):
    values = rates(learner(schedule="linear", flat=flat, final=final), 20)
    assert all(math.isfinite(value) and 0 <= value <= 1e-3 for value in values) and values[0] == 1e-3


def test_a_cosine_is_flat_then_half_a_wave_down_to_its_floor():
    """Against PyTorch's own, which begins where the rate begins to fall."""
    values = rates(learner(schedule="cosine", flat=0.25, final=0.0), 20)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-3)
    wave, expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15), []
    for _ in range(15):
        expected.append(wave.get_last_lr()[0])
        optimizer.step()
        wave.step()
    assert values[:5] == [1e-3] * 5 and values[5:] == pytest.approx(expected)
    assert min(rates(learner(schedule="cosine", final=0.2), 20)) == pytest.approx(2e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_rises_evenly_to_what_the_schedule_gives(schedule):
    plain, warm = (rates(learner(schedule=schedule, warm_up=count), 20) for count in (0, 4))
    assert warm[:4] == pytest.approx([value * part / 4 for value, part in zip(plain, (1, 2, 3, 4), strict=False)])
    assert warm[4:] == plain[4:]


def test_metrics_of_ranks_merge_by_weight_and_keep_the_largest():
    ranks = [
        {"loss": (6.0, 3.0, 4.0), "grad_norm": (0.5, 1.0, 0.5)},
        {"loss": (1.0, 1.0, 9.0), "grad_norm": (0.5, 1.0, 0.5)},
        {"loss": (0.0, 0.0, 0.0), "grad_norm": (0.5, 1.0, 0.5)},  # a rank that had padding only
    ]
    assert reduce_metrics(ranks) == {"loss": (7 / 4, 9.0), "grad_norm": (0.5, 0.5)}


def test_a_step_in_which_every_sample_is_masked_merges_to_zero():
    assert reduce_metrics([{"loss": (0.0, 0.0, 0.0)}]) == {"loss": (0.0, 0.0)}


@pytest.mark.parametrize("actor", [True, False])
def test_a_critic_learns_once_a_step_from_the_pieces_of_all_updates(monkeypatch, actor):
    made, seen = learner(), []
    made.world, made.ema, made.algorithm = 2, None, PPO(PPO.Config())
    made.critic = SimpleNamespace(update=lambda batches, scale, metrics, pretraining: seen.append((batches, scale)))
    monkeypatch.setattr(made, "_critic_batches", lambda work: work.micro_batches)
    updated = []
    monkeypatch.setattr(made, "_update_actor", lambda work, mine, *_: updated.append((mine, len(seen))) or True)
    pieces = [
        MicroBatch(update=update, source=0, start=0, stop=2, advantages=np.zeros(2), weights=np.ones(2))
        for update in (0, 0, 1)
    ]
    record = Record(chunk_of(Prompt(0, "p"), (1, 2)), 0, np.zeros(1), np.ones(4), np.zeros((2, 3), int))
    work = rank_work(3, pieces, [TrainingChunk(record, {})], train_actor=actor)
    made.update(replace(work, totals={0: 4.0, 1: 1.0}))
    assert seen == [(pieces, 2 / 5)] and made.updates == 2
    assert updated == ([(pieces[:2], 0), (pieces[2:], 0)] if actor else [])
    made.update(replace(work, step=4, totals={0: 0.0, 1: 0.0}))
    assert len(seen) == 1


def test_a_metric_that_only_some_ranks_have_is_the_mean_of_theirs():
    found = reduce_metrics([{"loss": (2.0, 1.0, 2.0)}, {"loss": (4.0, 2.0, 3.0), "value_loss": (3.0, 2.0, 2.5)}])
    assert found == {"loss": (2.0, 3.0), "value_loss": (1.5, 2.5)}
