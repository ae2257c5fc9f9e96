"""The states that a critic learns from: which are kept, which an update reads, and what they regress on."""

import numpy as np
import pytest

from align_cluster.config.check import check
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.loop.replay import Block, ReplayBuffer

SIGMAS = np.array([1.0, 0.7, 0.4, 0.1, 0.0])


def settings(images: int = 12, minibatch: int = 4, seed: int = 0, **algorithm) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "replay",
            "steps": 5,
            "seed": seed,
            "prompts_per_step": 4,
            "backbone": {"kind": "sd3"},
            "prompts": {"kind": "embedded"},
            "rollout": {"group_size": 1, "steps": 4},
            "rewards": {"clip": {"kind": "clip_score"}, "geneval": {"kind": "geneval"}},
            "algorithm": {"kind": "ppo", "replay": {"images": images, "minibatch": minibatch}} | algorithm,
            "evaluate": {"prompts": {"kind": "embedded", "split": "held_out"}},
        }
    )


def block(step: int, count: int = 4) -> Block:
    """A step's images, whose every number says which state it belongs to."""
    numbers = 100 * step + np.arange(count)
    states = (numbers[:, None] + 0.25 * np.arange(2))[:, :, None, None, None] * np.ones((1, 1, 2, 1, 1))
    rewards = np.stack([numbers, -numbers], 1).astype(np.float64)
    places = np.tile([1, 3], (count, 1))
    return Block.of(states.astype(np.float16), places, rewards, np.full(count, step), [f"p{i}" for i in numbers])


def read(buffer: ReplayBuffer, step: int, mean=(0.0, 0.0), deviation=(1.0, 1.0)):
    return buffer.minibatches(step, SIGMAS, np.array(mean), np.array(deviation))


def filled(config: RunConfig, steps: int) -> ReplayBuffer:
    buffer = ReplayBuffer(config)
    for step in range(1, steps + 1):
        buffer.add(block(step))
    return buffer


def test_the_oldest_steps_go_first_and_there_are_never_more_images_than_allowed():
    buffer = ReplayBuffer(settings(images=12))
    sizes = []
    for step in range(1, 7):
        buffer.add(block(step))
        sizes.append(len(buffer))
    assert sizes == [4, 8, 12, 12, 12, 12]
    assert [kept.versions[0] for kept in buffer.blocks] == [4, 5, 6] and buffer.age == 1
    buffer.add(block(7, 3))
    assert len(buffer) == 11


def test_a_state_comes_with_its_level_its_text_and_what_its_own_image_was_paid():
    batches = read(filled(settings(), 3), 3, (50, -1), (10, 2))
    assert len(batches) == 4  # critic_epochs 4, of 4 images each
    for batch in batches:
        assert batch.states.shape == (8, 2, 1, 1) and batch.total == 8 and batch.states.dtype == np.float16
        for state, level, target, text in zip(batch.states, batch.levels, batch.targets, batch.texts, strict=True):
            number, later = divmod(float(state[0, 0, 0]), 1)
            assert text == f"p{int(number)}" and level == np.float32(SIGMAS[3 if later else 1])
            assert target == pytest.approx([(number - 50) / 10, (1 - number) / 2])
        assert sorted(batch.levels) == [np.float32(0.1)] * 4 + [np.float32(0.7)] * 4


def test_what_is_paid_later_is_discounted():
    plain, less = (read(filled(settings(discount=d), 1), 1) for d in (1.0, 0.5))
    for one, other in zip(plain, less, strict=True):
        factors = np.where(one.levels > 0.5, 0.5**2, 1.0)  # two denoising steps before the last one, and none
        np.testing.assert_allclose(other.targets, one.targets * factors[:, None], rtol=1e-6)


def test_updates_go_through_all_images_before_one_comes_again():
    batches = read(filled(settings(minibatch=3), 3), 1)
    seen = [text for batch in batches for text in dict.fromkeys(batch.texts)]
    assert len(batches) == 5 and len(set(seen[:12])) == 12  # round(4 epochs of 4 images / 3)


def test_fewer_states_of_an_image_can_be_read_at_once():
    batches = [batch for step in range(20) for batch in read(filled(settings(critic_states=1), 3), step)]
    assert all(len(batch.texts) == 4 == len(set(batch.texts)) for batch in batches)
    assert {float(level) for batch in batches for level in batch.levels} == {float(np.float32(s)) for s in (0.7, 0.1)}


def test_what_is_read_follows_from_seed_and_step_and_from_what_is_kept_alone():
    buffer, again = filled(settings(), 3), ReplayBuffer(settings())
    again.restore(buffer.arrays())

    def said(buffer: ReplayBuffer, step: int) -> list:
        return [(batch.texts, batch.states.tolist(), batch.targets.tolist()) for batch in read(buffer, step)]

    assert said(buffer, 5) == said(buffer, 5) == said(again, 5)
    assert said(buffer, 5) != said(buffer, 6) and said(buffer, 5) != said(filled(settings(seed=1), 3), 5)
    for one in (buffer, again):
        one.add(block(9))
    assert said(buffer, 9) == said(again, 9)


def test_arrays_in_a_checkpoint_do_not_change_with_the_run():
    buffer = filled(settings(images=4), 1)
    arrays = buffer.arrays()
    copies = {name: array.copy() for name, array in arrays.items()}
    buffer.add(block(2))
    assert arrays.keys() == copies.keys() and all(np.array_equal(arrays[name], copies[name]) for name in arrays)


def test_what_is_no_number_is_not_kept_and_a_reward_that_does_not_judge_is_left_out():
    given = block(1)
    states, rewards = given.states.copy(), given.rewards.copy()
    states[0, 1, 0] = np.inf
    rewards[1] = np.nan
    rewards[2] = [1e300, 7.0]
    found = Block.of(states, given.places, rewards, given.versions, given.prompts)
    assert found.prompts == ["p102", "p103"] and np.isnan(found.rewards[0, 0]) and found.rewards[0, 1] == 7
    buffer = ReplayBuffer(settings())
    buffer.add(Block.of(states[:1], given.places[:1], rewards[:1], given.versions[:1], given.prompts[:1]))
    assert len(buffer) == 0 and read(buffer, 1) == ()


def test_a_buffer_that_holds_less_than_a_step_is_refused():
    with pytest.raises(
        UserError, match="replay.images is 3, fewer than the 4 images of a step.*set it to at least 4, or"
    ):
        check(settings(images=3, minibatch=2))
    assert check(settings(images=0)) == []
