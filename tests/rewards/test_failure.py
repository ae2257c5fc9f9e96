import numpy as np
import pytest
import torch

from align_cluster.rewards.base import FailurePolicy, Result, RewardError, RewardSection
from align_cluster.rewards.failure import classify, score_with
from align_cluster.rewards.mix import lost
from align_cluster.types import Failure, Prompt, Scores

IMAGES = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
PROMPTS = [Prompt(i, f"p{i}") for i in range(6)]
AT_ONCE = FailurePolicy(retries=2, backoff_s=0.0)


def brightness(images: np.ndarray, prompts: list[Prompt]) -> Result:
    values = images.mean((1, 2, 3))
    assert [prompt.id for prompt in prompts] == values.tolist()  # every image stays with its prompt
    return Result(values, np.ones(len(images), bool), {"double": 2 * values})


def test_errors_have_kinds():
    for error, kind in (
        (RewardError("unavailable", "no"), "unavailable"),
        (RewardError("bad_input", "no"), "bad_input"),
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA"), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (TimeoutError("late"), "timeout"),
        (ConnectionRefusedError("gone"), "unavailable"),
        (ValueError("odd"), "model_error"),
        (KeyError("count"), "model_error"),
    ):
        assert classify(error) == kind


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    for fits in (1, 2, 3, 5):
        sizes = []

        def small(images, prompts, fits=fits, sizes=sizes):
            sizes.append(len(images))
            if len(images) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return brightness(images, prompts)

        result, failure = score_with(small, IMAGES, PROMPTS, AT_ONCE)
        assert failure is None and result.valid.all()
        np.testing.assert_array_equal(result.values, range(6))
        np.testing.assert_array_equal(result.details["double"], 2 * np.arange(6))
        assert sizes[0] == 6 and min(sizes) >= max(1, fits // 2) and sum(size for size in sizes if size <= fits) == 6


def test_an_image_that_does_not_fit_alone_fails_alone():
    def small(images, prompts):
        if (images == 4).any():
            raise MemoryError("too large")
        return brightness(images, prompts)

    result, failure = score_with(small, IMAGES, PROMPTS, AT_ONCE)
    assert failure == Failure("oom", "MemoryError: too large", 1)
    np.testing.assert_array_equal(result.valid, [True, True, True, True, False, True])
    assert np.isnan(result.values[4]) and result.values[5] == 5 and np.isnan(result.details["double"][4])


def test_a_broken_image_costs_itself_only_and_is_not_tried_again():
    calls = []

    def picky(images, prompts):
        calls.append(tuple(prompt.id for prompt in prompts))
        if (images == 1).any() or (images == 5).any():
            raise RewardError("bad_input", "not an image")
        return brightness(images, prompts)

    result, failure = score_with(picky, IMAGES, PROMPTS, AT_ONCE)
    assert failure == Failure("bad_input", "RewardError: not an image", 2)
    np.testing.assert_array_equal(result.valid, [True, False, True, True, True, False])
    assert len(set(calls)) == len(calls) and (1,) in calls and (5,) in calls


def test_a_failure_that_passes_leaves_no_trace_and_waits_twice_as_long_each_time(monkeypatch):
    waits, errors = [], [TimeoutError("late"), ConnectionError("gone")]
    monkeypatch.setattr("align_cluster.rewards.failure.time.sleep", waits.append)

    def shaky(images, prompts):
        if errors:
            raise errors.pop()
        return brightness(images, prompts)

    result, failure = score_with(shaky, IMAGES, PROMPTS, FailurePolicy(retries=2, backoff_s=0.5))
    assert failure is None and result.valid.all() and waits == [0.5, 1.0]


def test_after_the_last_try_all_images_have_no_score_and_the_last_reason_is_told():
    calls = []

    def broken(images, prompts):
        calls.append(1)
        raise ValueError(f"try {len(calls)}")

    result, failure = score_with(broken, IMAGES, PROMPTS, AT_ONCE)
    assert len(calls) == 3 and failure == Failure("model_error", "ValueError: try 3", 6)
    assert not result.valid.any() and np.isnan(result.values).all()


def test_values_that_are_not_numbers_are_a_failure_and_not_a_score():
    def nan(images, prompts):
        return Result(np.full(len(images), np.nan), np.ones(len(images), bool))

    _, failure = score_with(nan, IMAGES, PROMPTS, AT_ONCE)
    assert failure.kind == "model_error" and "not finite" in failure.message


def test_the_policy_of_a_trained_reward_decides_what_a_failure_costs():
    ok, partly = np.ones(3, bool), np.array([True, False, True])
    whole = Scores({"a": np.zeros(3), "b": np.zeros(3)}, {"a": ok, "b": ok})
    failed = Scores({"a": np.zeros(3), "b": np.zeros(3)}, {"a": partly, "b": ok}, {"a": Failure("timeout", "late", 1)})
    for then, role, costs in (
        ("mask", "train", [False, False, False]),
        ("drop_group", "train", [False, True, False]),
        ("mask", "monitor", [False, False, False]),
        ("drop_group", "monitor", [False, False, False]),
        ("fail", "monitor", [False, False, False]),
    ):
        rewards = {"a": RewardSection(role=role, on_failure={"then": then}), "b": RewardSection()}
        np.testing.assert_array_equal(lost([whole, failed], rewards), [False] * 3 + costs)
    rewards = {"a": RewardSection(on_failure={"then": "fail"}), "b": RewardSection()}
    with pytest.raises(RuntimeError, match=r"rewards\.a has no score for 1 images \(timeout: late\).*is fail"):
        lost([whole, failed], rewards)
