"""The critic's own training, on the real tiny network."""

from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest
import torch

from align_cluster.algorithms.base import Batch, CriticTargets, RecordedSteps
from align_cluster.algorithms.gae import explained_variance
from align_cluster.algorithms.ppo import PPO
from align_cluster.backbones.adapters import add_adapters
from align_cluster.backbones.base import CriticSection
from align_cluster.backbones.critic import Critic
from align_cluster.backbones.sd3 import SD3
from align_cluster.learner.batching import MetricSums
from align_cluster.learner.critic import CriticBatch, CriticLearner
from align_cluster.learner.settings import OptimizerConfig
from align_cluster.rollouts.guidance import TextBatch
from align_cluster.types import Prompt, Record, ReplayBatch

from ..drawing import chunk_of

SIGMAS = np.array([1.0, 0.7, 0.3, 0.1, 0.0])


@pytest.fixture
def learner(sd35):
    torch.manual_seed(0)
    actor = add_adapters(sd35, sd35.load_denoiser(), ("default", "critic"))
    algorithm = PPO(PPO.Config(critic_lr=3e-3, value_clip=100, critic_epochs=1))
    return CriticLearner(Critic(sd35, actor, 1, CriticSection(width=32, heads=4)), algorithm, OptimizerConfig(), 1)


@pytest.fixture(scope="module")
def sd35(tiny_pipeline):
    return SD3(SD3.Config(path=str(tiny_pipeline("sd3")), precision="fp32", lora={"rank": 4, "alpha": 8}))


@pytest.fixture(scope="module")
def condition(sd35):
    return sd35.encode(["a photo of a red circle"])[0]


def rollouts(condition, count: int, seed: int) -> tuple[Record, TextBatch, np.ndarray]:
    """Noised latents at every level, and the rewards of what they were made of: the mean of a channel."""
    rng = np.random.default_rng(seed)
    x0 = rng.normal(size=(count, 4, 8, 8)).astype(np.float32) + rng.normal(size=(count, 4, 1, 1)).astype(np.float32)
    noise = rng.normal(size=x0.shape).astype(np.float32)
    path = np.stack([(1 - s) * x0 + s * noise for s in SIGMAS[:-1]], 1).astype(np.float32)
    indices = np.tile(np.arange(4), (count, 1))
    chunk = chunk_of(Prompt(0, "p"), range(count))
    text = TextBatch.build([condition] * count, None, torch.device("cpu"))
    rewards = x0[:, 0].mean((1, 2))
    return Record(chunk, 1, x0, SIGMAS, indices, before=path), text, (rewards - rewards.mean()) / rewards.std()


def batch(record: Record, rewards: np.ndarray, values: np.ndarray) -> Batch:
    returns = torch.tensor(rewards, dtype=torch.float32)[:, None, None].expand(-1, 4, 1)
    return Batch(
        passes=(0,) * len(rewards),
        advantages=torch.zeros(len(rewards), 4),
        x0=torch.tensor(record.x0),
        sigmas=record.sigmas,
        recorded=RecordedSteps(indices=torch.tensor(record.indices), before=torch.tensor(record.before), slots=()),
        generators=lambda purpose, shared=False: [],
        critic=CriticTargets(returns, torch.tensor(values)),
    )


@pytest.mark.slow
def test_it_learns_a_linear_reward_where_there_is_little_noise(learner, condition):
    for update in range(60):
        record, text, rewards = rollouts(condition, 16, update)
        values = learner.values(record, text)
        learner.update([CriticBatch(batch(record, rewards, values), text, torch.ones(16))], 1 / 16, MetricSums())
    record, text, rewards = rollouts(condition, 64, 10_000)
    known = [explained_variance(learner.values(record, text)[:, k, 0], rewards) for k in range(4)]
    assert known[3] > 0.9 and known[2] > 0.8 and known[0] < 0.2
    assert known[0] < known[1] < min(known[2:])  # the last two differ by less than kernels of processors do


def test_an_update_is_the_gradient_step_of_the_mean_loss_over_samples_and_steps(learner, condition):
    """By hand: plain autograd over all states at once, clipping, one step of AdamW."""
    record, text, rewards = rollouts(condition, 6, 1)
    values = learner.values(record, text)
    critic, before = learner.critic, [parameter.detach().clone() for parameter in learner.critic.trainable]
    weights = torch.tensor([1.0, 1, 0, 1, 1, 1])
    given = batch(record, rewards, values)
    losses, texts = [], (text.sequence.expand(6, -1, -1), text.pooled.expand(6, -1))
    for k in range(4):
        said = critic(given.recorded.before[:, k], torch.full((6,), float(SIGMAS[k])), *texts)
        losses.append((0.5 * (said - given.critic.returns[:, k]) ** 2)[:, 0] * weights)
    gradients = torch.autograd.grad(torch.stack(losses).sum() / (4 * 5), critic.trainable, allow_unused=True)
    sums = MetricSums()
    learner.update([CriticBatch(given, text, weights)], 1 / 5, sums)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    assert sums.sums["critic_grad_norm"].total == pytest.approx(float(norm), rel=1e-4)
    for parameter, old, gradient in zip(critic.trainable, before, gradients, strict=True):
        clipped = torch.zeros_like(old) if gradient is None else gradient * min(1.0, 1.0 / float(norm))
        step = clipped / (clipped.abs() + 1e-8)  # AdamW's first
        expected = old * (1 - 3e-3 * OptimizerConfig().weight_decay) - 3e-3 * step
        sure = clipped.abs() > 1e-5
        torch.testing.assert_close(parameter.detach()[sure], expected[sure], rtol=1e-3, atol=1e-5)


def test_cut_into_micro_batches_the_update_is_the_same(sd35, condition, learner):
    record, text, rewards = rollouts(condition, 6, 2)
    values = learner.values(record, text)
    learner.optimizer = torch.optim.SGD(learner.critic.trainable, 0.1)  # AdamW's first step is all signs
    start = {name: value.clone() for name, value in learner.critic.state().items()}
    whole = batch(record, rewards, values)
    learner.update([CriticBatch(whole, text, torch.ones(6))], 1 / 6, MetricSums())
    together = {name: value.clone() for name, value in learner.critic.state().items()}
    learner.critic.restore(start)
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        piece = Record(record.chunk, 1, record.x0[rows], SIGMAS, record.indices[rows], before=record.before[rows])
        own = TextBatch.build([condition] * (rows.stop - rows.start), None, torch.device("cpu"))
        parts.append(CriticBatch(batch(piece, rewards[rows], values[rows]), own, torch.ones(rows.stop - rows.start)))
    learner.update(parts, 1 / 6, MetricSums())
    for name, value in learner.critic.state().items():
        torch.testing.assert_close(value, together[name], rtol=1e-4, atol=1e-6)


def test_with_gradient_checkpointing_the_update_is_the_same(sd35, condition, learner):
    record, text, rewards = rollouts(condition, 4, 4)
    given = batch(record, rewards, learner.values(record, text))
    learner.optimizer = torch.optim.SGD(learner.critic.trainable, 0.1)
    with torch.no_grad():
        for parameter in learner.critic.trainable:  # an adapter that begins at zero has no gradient in its other half
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    start = {name: value.clone() for name, value in learner.critic.state().items()}
    learner.update([CriticBatch(given, text, torch.ones(4))], 1 / 4, MetricSums())
    plain = {name: value.clone() for name, value in learner.critic.state().items()}
    learner.critic.restore(start)
    learner.critic.network.train().enable_gradient_checkpointing()
    learner.update([CriticBatch(given, text, torch.ones(4))], 1 / 4, MetricSums())
    assert any(name.startswith("adapter") and not torch.equal(plain[name], start[name]) for name in start)
    for name, value in learner.critic.state().items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-6)


def test_of_fewer_states_each_epoch_trains_others_and_their_mean_is_that_of_all(learner, condition):
    record, text, rewards = rollouts(condition, 4, 5)
    values = learner.values(record, text)

    def streams(purpose: str, *, shared: bool = False) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(crc32(f"{row} {purpose}".encode())) for row in range(4)]

    given = replace(batch(record, rewards, values), generators=streams)
    assert learner._slots(given, 0) == [[0, 1, 2, 3]] * 4
    learner.algorithm = PPO(PPO.Config(critic_states=1, value_clip=100, critic_epochs=1))
    drawn = [learner._slots(given, epoch) for epoch in range(20)]
    assert all(len(own) == 1 for rows in drawn for own in rows)
    assert all({rows[row][0] for rows in drawn} == {0, 1, 2, 3} for row in range(4))
    assert any(len({own[0] for own in rows}) > 1 for rows in drawn)
    assert drawn == [learner._slots(given, epoch) for epoch in range(20)]

    def gradient(slots: list[int]) -> torch.Tensor:
        learner._slots = lambda batch, epoch: [slots] * 4
        learner.optimizer = torch.optim.SGD(learner.critic.trainable, 0.0)
        found, last = [], list(learner.critic.head.last.parameters())
        learner._step = lambda sound: found.append([parameter.grad.clone() for parameter in last]) or 0.0
        learner.optimizer.zero_grad()
        learner.update([CriticBatch(given, text, torch.ones(4))], 1 / 4, MetricSums())
        return torch.cat([part.flatten() for part in found[0]])

    torch.testing.assert_close(torch.stack([gradient([k]) for k in range(4)]).mean(0), gradient([0, 1, 2, 3]))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_however_many_states_are_read_at_once_the_update_is_the_same(learner, condition, batch_size):
    """Two prompts, whose texts differ in length, as some backbones' do."""
    short = replace(condition, sequence=condition.sequence[:-3])
    parts = []
    for seed, text in enumerate((condition, short)):
        record, batched, rewards = rollouts(text, 3, seed)
        values = learner.values(record, batched)
        parts.append(CriticBatch(batch(record, rewards, values), batched, torch.tensor([1.0, 0, 1])))
    learner.optimizer = torch.optim.SGD(learner.critic.trainable, 0.1)
    start = {name: value.clone() for name, value in learner.critic.state().items()}
    read, network = [], learner.critic.forward
    learner.critic.forward = lambda x, *rest: read.append(len(x)) or network(x, *rest)
    learner.batch = 8
    learner.update(parts, 1 / 4, MetricSums())
    assert read == [8, 8]  # nothing of what is masked
    together = {name: value.clone() for name, value in learner.critic.state().items()}
    learner.critic.restore(start)
    learner.batch = batch_size
    learner.update(parts, 1 / 4, MetricSums())
    assert sum(read) == 32 and max(read[2:]) == min(batch_size, 8)
    for name, value in learner.critic.state().items():
        torch.testing.assert_close(value, together[name], rtol=1e-4, atol=1e-6)


def test_values_are_each_states_own_however_many_are_read_at_once(learner, condition):
    with torch.no_grad():
        for parameter in learner.critic.trainable:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    record, text, _ = rollouts(condition, 3, 6)
    record.indices[1] = record.indices[1, ::-1]
    found = learner.values(record, text)
    for row in range(3):
        for slot, k in enumerate(record.indices[row]):
            x, sigma = torch.tensor(record.before[row : row + 1, slot]), torch.tensor([SIGMAS[k]]).float()
            alone = learner.critic(x, sigma, text.sequence[:1], text.pooled[:1])
            assert found[row, slot] == pytest.approx(alone[0].detach().numpy(), rel=1e-3, abs=1e-4)
    learner.batch = 5
    np.testing.assert_allclose(learner.values(record, text), found, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_changes_no_weight(learner, condition):
    record, text, rewards = rollouts(condition, 2, 3)
    values = learner.values(record, text)
    before = {name: value.clone() for name, value in learner.critic.state().items()}
    record.before[0, 1] = np.nan
    sums = MetricSums()
    learner.update([CriticBatch(batch(record, rewards, values), text, torch.ones(2))], 0.5, sums)
    assert sums.sums["critic_skipped"].total == 1 and "critic_grad_norm" not in sums.sums
    assert all(torch.equal(value, before[name]) for name, value in learner.critic.state().items())


def replayed(condition, count: int = 6, heads: int = 1) -> tuple[ReplayBatch, dict]:
    """States of two prompts, whose texts differ in length, and their conditions."""
    record, _, rewards = rollouts(condition, count, 8)
    places = np.arange(count) % 4
    targets = np.repeat(rewards.astype(np.float32)[:, None], heads, 1)
    states, levels = record.before[np.arange(count), places].astype(np.float16), SIGMAS[places].astype(np.float32)
    conditions = {"long": condition, "short": replace(condition, sequence=condition.sequence[:-3])}
    texts = tuple(("long", "short")[i % 3 == 0] for i in range(count))
    return ReplayBatch(states, levels, targets, texts, count), conditions


@pytest.mark.parametrize("batch_size", [2, 24])
def test_a_replayed_batch_is_the_gradient_step_of_its_mean_squared_error(learner, condition, batch_size):
    given, conditions = replayed(condition)
    learner.batch, critic = batch_size, learner.critic
    learner.optimizer = torch.optim.SGD(critic.trainable, 0.1)
    losses = []
    for i, text in enumerate(given.texts):
        own = TextBatch.build([conditions[text]], None, torch.device("cpu"))
        x, level = torch.tensor(given.states[i : i + 1]).float(), torch.tensor(given.levels[i : i + 1])
        losses.append(0.5 * (critic(x, level, own.sequence, own.pooled) - float(given.targets[i, 0])) ** 2)
    loss = torch.cat(losses).mean()
    gradients = torch.autograd.grad(loss, critic.trainable, allow_unused=True)
    norm = float(torch.stack([g.norm() for g in gradients if g is not None]).norm())
    before, sums = [parameter.detach().clone() for parameter in critic.trainable], MetricSums()
    learner.replay([given], conditions, sums)
    said = sums.sums["value_loss"]
    assert said.total / said.weight == pytest.approx(float(loss.detach()), rel=1e-4)
    for parameter, old, gradient in zip(critic.trainable, before, gradients, strict=True):
        step = 0 if gradient is None else 0.1 * gradient * min(1.0, 1.0 / norm)
        torch.testing.assert_close(parameter.detach(), old - step, rtol=1e-3, atol=1e-6)


def test_ranks_share_a_replayed_batch_and_a_reward_that_does_not_judge_has_no_part_in_it(learner, condition):
    given, conditions = replayed(condition)
    last = list(learner.critic.head.last.parameters())

    def gradient(batch: ReplayBatch) -> torch.Tensor:
        found = []
        learner._step = lambda sound: found.append(torch.cat([p.grad.flatten().clone() for p in last])) or 0.0
        learner.optimizer.zero_grad()
        learner.replay([batch], conditions, MetricSums())
        return found[0]

    whole = gradient(given)
    learner.world = 2  # a rank's gradient is twice as large, and then averaged
    torch.testing.assert_close(sum(gradient(given.share(rank, 2)) for rank in range(2)) / 2, whole)
    learner.world = 1
    unjudged = given.targets.copy()
    unjudged[3:] = np.nan
    half = ReplayBatch(given.states[:3], given.levels[:3], given.targets[:3], given.texts[:3], given.total)
    torch.testing.assert_close(gradient(replace(given, targets=unjudged)), gradient(half))


def test_a_rank_without_a_share_of_a_small_batch_makes_an_update_of_nothing(learner, condition):
    given, conditions = replayed(condition)
    sums = MetricSums()
    learner.replay([given.share(6, 7)], conditions, sums)
    assert sums.sums["critic_skipped"].total == 0 and "value_loss" not in sums.sums


def test_replay_keeps_states_of_each_samples_own_choice_in_half_precision(learner, condition):
    record, _, _ = rollouts(condition, 40, 9)
    record.indices[:] = record.indices[:, ::-1]
    states, places = learner.kept(record)
    assert states.shape == (40, 2, 4, 8, 8) and states.dtype == np.float16 and places.shape == (40, 2)
    for row in range(40):
        slots = [list(record.indices[row]).index(place) for place in places[row]]
        assert np.array_equal(states[row], record.before[row, slots].astype(np.float16))
    assert {tuple(sorted(own)) for own in places.tolist()} == {(a, b) for a in range(4) for b in range(a + 1, 4)}
    rows = slice(10, 20)
    part = Record(
        chunk_of(Prompt(0, "p"), range(10, 20)), 1, record.x0[rows], SIGMAS, record.indices[rows], record.before[rows]
    )
    assert np.array_equal(learner.kept(part)[1], places[rows])  # whatever chunk it is in
    learner.algorithm = PPO(PPO.Config(replay={"states": 9}))
    assert np.array_equal(learner.kept(record)[0], record.before.astype(np.float16))
