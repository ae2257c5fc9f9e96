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

        result = score_with(small, IMAGES, PROMPTS, AT_ONCE)
        assert result.failure is None and result.valid.all()
        np.testing.assert_array_equal(result.values, range(6))
        np.testing.assert_array_equal(result.details["double"], 2 * np.arange(6))
        assert sizes[0] == 6 and min(sizes) >= max(1, fits // 2) and sum(size for size in sizes if size <= fits) == 6


def test_an_image_that_does_not_fit_alone_fails_alone():
    def small(images, prompts):
        if (images == 4).any():
            raise MemoryError("too large")
        return brightness(images, prompts)

    result = score_with(small, IMAGES, PROMPTS, AT_ONCE)
    assert result.failure == Failure("oom", "MemoryError: too large", (4,))
    np.testing.assert_array_equal(result.valid, [True, True, True, True, False, True])
    assert np.isnan(result.values[4]) and result.values[5] == 5 and np.isnan(result.details["double"][4])


def test_a_broken_image_costs_itself_only_and_is_not_tried_again():
    calls = []

    def picky(images, prompts):
        calls.append(tuple(prompt.id for prompt in prompts))
        if (images == 1).any() or (images == 5).any():
            raise RewardError("bad_input", "not an image")
        return brightness(images, prompts)

    result = score_with(picky, IMAGES, PROMPTS, AT_ONCE)
    assert result.failure == Failure("bad_input", "RewardError: not an image", (1, 5))
    np.testing.assert_array_equal(result.valid, [True, False, True, True, True, False])
    assert len(set(calls)) == len(calls) and (1,) in calls and (5,) in calls


def test_a_failure_that_passes_leaves_no_trace_and_waits_twice_as_long_each_time(monkeypatch):
    waits, errors = [], [TimeoutError("late"), ConnectionError("gone")]
    monkeypatch.setattr("align_cluster.rewards.failure.time.sleep", waits.append)

    def shaky(images, prompts):
        if errors:
            raise errors.pop()
        return brightness(images, prompts)

    result = score_with(shaky, IMAGES, PROMPTS, FailurePolicy(retries=2, backoff_s=0.5))
    assert result.failure is None and result.valid.all() and waits == [0.5, 1.0]


def test_after_the_last_try_all_images_have_no_score_and_the_last_reason_is_told():
    calls = []

    def broken(images, prompts):
        calls.append(1)
        raise ValueError(f"try {len(calls)}")

    result = score_with(broken, IMAGES[:1], PROMPTS[:1], AT_ONCE)
    assert len(calls) == 3 and result.failure == Failure("model_error", "ValueError: try 3", (0,))
    assert not result.valid.any() and np.isnan(result.values).all()


@pytest.mark.parametrize("error", [ValueError("odd"), TimeoutError("late"), ConnectionError("gone")], ids=str)
def test_a_failure_of_any_kind_costs_the_images_that_cause_it_alone(error):
    """The whole batch has all of its tries, since the failure may pass; the parts have one each."""
    calls = []

    def picky(images, prompts):
        calls.append(tuple(prompt.id for prompt in prompts))
        if (images == 0).any() or (images == 4).any():
            raise error
        return brightness(images, prompts)

    result = score_with(picky, IMAGES, PROMPTS, AT_ONCE)
    assert result.failure == Failure(classify(error), f"{type(error).__name__}: {error}", (0, 4))
    np.testing.assert_array_equal(result.values, [np.nan, 1, 2, 3, np.nan, 5])
    assert calls[:3] == [tuple(range(6))] * 3 and len(set(calls[3:])) == len(calls) - 3 <= 10


def test_looking_for_the_images_to_blame_ends_with_the_time_of_the_policy(monkeypatch):
    """Each call takes 40 s, so three tries leave 180 s, and a half is cut again only if its parts fit into the rest."""
    now, calls = [0.0], []
    monkeypatch.setattr("align_cluster.rewards.failure.time.monotonic", lambda: now[0])

    def dead(images, prompts):
        calls.append(len(images))
        now[0] += 40
        raise TimeoutError("no answer")

    result = score_with(dead, IMAGES, PROMPTS, FailurePolicy(retries=2, backoff_s=0, timeout_s=300))
    assert result.failure == Failure("timeout", "TimeoutError: no answer", tuple(range(6)))
    assert now[0] <= 300 and calls[:4] == [6, 6, 6, 3] and len(calls) > 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e300])
def test_a_value_that_nobody_can_compute_with_costs_its_image_alone_and_asks_nobody_again(value):
    calls = []

    def odd(images, prompts):
        calls.append(len(images))
        values = images.mean((1, 2, 3))
        return Result(np.where(values == 2, value, values), values != 3, {"double": 2 * values})

    result = score_with(odd, IMAGES, PROMPTS, AT_ONCE)
    message = "ValueError: 1 of 6 values are not finite, or above 1e+30"
    assert result.failure == Failure("model_error", message, (2,)) and calls == [6]  # image 3 is not judged
    np.testing.assert_array_equal(result.valid, [True, True, False, False, True, True])
    np.testing.assert_array_equal(result.values[result.valid], [0, 1, 4, 5])


def test_a_reward_that_knows_the_images_to_blame_names_them():
    def knows(images, prompts):
        values = np.where(images.mean((1, 2, 3)) < 2, np.nan, 1.0)
        return Result(values, values == 1, {}, Failure("bad_input", "no record", (0, 1)))

    assert score_with(knows, IMAGES, PROMPTS, AT_ONCE).failure == Failure("bad_input", "no record", (0, 1))

    def contradicts(images, prompts):
        return Result(np.ones(len(images)), np.ones(len(images), bool), {}, Failure("bad_input", "no record", (0,)))

    assert "rows that are valid" in score_with(contradicts, IMAGES[:1], PROMPTS[:1], AT_ONCE).failure.message


def test_no_images_are_no_endless_search():
    def broken(images, prompts):
        raise ValueError("nothing to see")

    assert score_with(broken, IMAGES[:0], [], AT_ONCE).valid.shape == (0,)


def test_the_policy_of_a_trained_reward_decides_what_a_failure_costs():
    ok, partly = np.ones(3, bool), np.array([True, False, False])  # the third prompt is none that reward a judges
    late = Failure("timeout", "late", (1,))
    whole = Scores({"a": np.zeros(3), "b": np.zeros(3)}, {"a": ok, "b": ok})
    failed = Scores({"a": np.zeros(3), "b": np.zeros(3)}, {"a": partly, "b": ok}, {"a": late})
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
