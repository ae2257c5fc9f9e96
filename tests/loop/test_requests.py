"""What a run asks of its samplers: a function of its settings and the step alone, so no worker is needed."""

import numpy as np
import pytest

from align_cluster.config.plan import settle
from align_cluster.config.run import RunConfig
from align_cluster.loop.requests import evaluation_request, plan_chunks, training_request
from align_cluster.rollouts.sampler import DrawRequest, Sampler, fingerprint
from align_cluster.rollouts.schedule import NativeSchedule
from align_cluster.rollouts.steps import Euler
from align_cluster.rollouts.windows import SlidingWindow
from align_cluster.types import Chunk, Prompt

TEXTS = ("a photo of a red circle", "a photo of two blue squares", "a photo of a green star")
PROMPTS = [Prompt(i, text) for i, text in enumerate(TEXTS)]
KEYS = dict.fromkeys(TEXTS, "key")


def settings(algorithm: dict | None = None, rollout: dict | None = None, **more) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "requests",
            "steps": 9,
            "prompts_per_step": 2,
            "backbone": {"kind": "sd3", "precision": "fp32", "lora": {"rank": 4, "alpha": 6}},
            "prompts": {"kind": "embedded"},
            "rollout": {"group_size": 4, "steps": 4, **(rollout or {})},
            "rewards": {"clip": {"kind": "clip_score"}},
            "algorithm": {"kind": "nft", **(algorithm or {})},
            "evaluate": {"prompts": {"kind": "embedded", "split": "held_out"}, "guidance": 2.0},
            **more,
        }
    )


def request(config: RunConfig, step: int | None) -> DrawRequest:
    """What is asked of samplers that hold weights 3, in a training step or (None) for an evaluation."""
    return evaluation_request(config, 3) if step is None else training_request(config, step, 3)


def chunks(config: RunConfig, step: int) -> list[Chunk]:
    return plan_chunks(settle(config, 2, 0), PROMPTS, step)


RICH = settings(
    {"kind": "grpo", "ratio": "guard"},
    {
        "step": {"kind": "dance_sde", "eta": 0.2},
        "schedule": {"kind": "linear"},
        "window": {"kind": "sliding", "size": 2, "iters_per_group": 1},
        "guidance": 3.5,
    },
    exploration={"conditions": 3, "rho": 0.3},
)


def test_a_training_request_says_all_that_the_settings_say():
    window = SlidingWindow(SlidingWindow.Config(size=2, iters_per_group=1))
    for step in range(4):
        asked, rollout = request(RICH, step), RICH.rollout
        expected = DrawRequest(
            3,
            4,
            rollout.step,
            guidance=3.5,
            window=window.plan(4, step, 0),
            means=True,
            schedule=rollout.schedule,
            exploration=RICH.exploration,
        )
        assert asked == expected
    assert [request(RICH, step).window.trained for step in range(4)] == [(0, 1), (1, 2), (2,), (0, 1)]


@pytest.mark.parametrize("config", [RICH, settings()], ids=["rich", "plain"])
def test_an_evaluation_is_plain_ode_sampling_whatever_training_draws(config):
    asked = request(config, None)
    assert asked == DrawRequest(3, 4, Euler.Config(), guidance=2.0)
    assert isinstance(asked.schedule, NativeSchedule.Config) and asked.window is None and not asked.means


def test_means_are_asked_for_by_the_guard_alone():
    assert request(RICH, 0).means
    assert not request(settings({"kind": "grpo"}), 0).means and not request(settings(), 0).means


def test_an_algorithm_without_density_asks_for_no_window():
    assert request(settings(), 0).window is None
    assert request(settings({"kind": "grpo"}), 0).window.trained == (0, 1, 2)


@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_one_condition_is_no_exploration_down_to_the_fingerprint(algorithm):
    plain = settings({"kind": algorithm})
    single = settings({"kind": algorithm}, exploration={"conditions": 1, "rho": 0.4})
    for step in (0, 5):
        assert chunks(single, step) == chunks(plain, step)
        assert request(single, step) == request(plain, step)
        for chunk in chunks(plain, step):
            ours, theirs = (fingerprint(chunk, request(config, step), KEYS, {}) for config in (single, plain))
            assert ours == theirs


def test_one_condition_draws_the_images_of_no_exploration():
    sampler, drawn = Sampler(settings().backbone), []
    sampler.version = 3
    conditions = dict(zip(TEXTS, sampler.encode(TEXTS), strict=True))
    for exploration in (None, {"conditions": 1}):
        config = settings(exploration=exploration)
        drawn.append(sampler.draw(chunks(config, 1)[0], conditions, None, request(config, 1)))
    (info, images, record), (other_info, other_images, other) = drawn
    np.testing.assert_array_equal(images, other_images)
    np.testing.assert_array_equal(record.x0, other.x0)
    assert info.fingerprint == other_info.fingerprint and info.chunk == other_info.chunk


def test_exploration_and_shared_noise_reach_the_rows_of_a_step():
    def rows(config):
        return [row for chunk in chunks(config, 1) for row in chunk.rows]

    explored = rows(settings(exploration={"conditions": 3}))
    assert [row.variant for row in explored] == [*[0] * 4, *[1] * 4, *[2] * 4] * 2
    assert all(len({row.noise for row in explored if row.group == group}) == 4 for group in (0, 1))
    shared = rows(settings({"kind": "grpo"}, {"same_noise": True}))
    assert all(len({row.noise for row in shared if row.group == group}) == 1 for group in (0, 1))
    assert len({row.seed for row in shared}) == 8


def test_chunks_hold_rows_of_several_groups_but_of_one_update_where_log_probs_are_compared():
    def groups(**more):
        return [{row.group for row in chunk.rows} for chunk in chunks(settings(prompts_per_step=6, **more), 1)]

    assert groups() == [{0, 1, 2}, {3, 4, 5}]
    assert groups(algorithm={"kind": "grpo"}, learner={"updates_per_step": 3}) == [{0}, {1}, {2}, {3}, {4}, {5}]
    assert groups(learner={"updates_per_step": 3}) == [{0, 1, 2}, {3, 4, 5}]
