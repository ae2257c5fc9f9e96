import numpy as np
import pytest

from align_cluster.embedded import scene
from align_cluster.embedded.render import render
from align_cluster.errors import UserError
from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import Result
from align_cluster.rewards.failure import checked
from align_cluster.rewards.geneval import GenEval
from align_cluster.rewards.worker import RewardWorker
from align_cluster.types import Failure, Prompt

RECORD = scene.prompts("colors", "held_out")[0]
IMAGES = render([RECORD] * 2, 1).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def worker():
    once = {"on_failure": {"retries": 0}}
    return RewardWorker(
        {"objects": GenEval.Config(**once), "strict": GenEval.Config(score="strict", role="monitor", **once)}
    )


def test_scores_carry_every_reward_by_its_name_in_the_run(worker):
    scores = worker.score(IMAGES, [Prompt(0, RECORD["prompt"], RECORD)] * 2)
    assert list(scores.values) == list(scores.valid) == ["objects", "strict"]
    np.testing.assert_array_equal(scores.values["objects"], [1, 1])
    assert set(scores.details) == {f"{n}/{d}" for n in ("objects", "strict") for d in ("accuracy", "strict", "graded")}
    assert scores.failures == {} and all(seconds > 0 for seconds in scores.seconds.values())


def test_an_image_that_fails_is_masked_alone_and_the_senders_mistake_is_named(worker):
    broken = Prompt(0, "a circle", {"include": [{"class": "circle"}]})  # a clause without its count
    scores = worker.score(IMAGES, [broken, Prompt(1, RECORD["prompt"], RECORD)])
    message = "metadata of 'a circle': include.0.count: field required, got {'class': 'circle'}"
    failure = Failure("bad_input", message, (0,))
    assert scores.failures == {"objects": failure, "strict": failure}
    for name in ("objects", "strict"):
        assert scores.valid[name].tolist() == [False, True] and np.isnan(scores.values[name][0])
        assert scores.values[name][1] == 1
    again = worker.score(IMAGES, [Prompt(0, RECORD["prompt"], RECORD)] * 2)
    assert again.failures == {} and again.valid["objects"].all()


def test_a_failing_reward_leaves_the_others_alone():
    pytest.importorskip("rapidocr", reason="the extra 'rewards' is not installed")
    worker = RewardWorker({"objects": GenEval.Config(on_failure={"retries": 0}), "text": REWARDS["ocr"].Config()})
    word = scene.prompts("ocr", "held_out")[1]
    broken = Prompt(0, word["prompt"], {**word, "include": [{"class": "circle"}]})
    scores = worker.score(render([word], 1).permute(0, 2, 3, 1).numpy(), [broken])
    assert list(scores.failures) == ["objects"] and scores.values["text"][0] == 1


def test_one_prompt_an_image(worker):
    with pytest.raises(ValueError, match="2 images came with 1 prompts"):
        worker.score(IMAGES, [Prompt(0, RECORD["prompt"], RECORD)])


@pytest.mark.parametrize(
    ("images", "given"),
    [
        (IMAGES / 255, r"float64 \[2, "),
        (IMAGES.astype(np.int16), r"int16 \[2, "),
        (IMAGES[..., :1], r"uint8 \[2, 48, 48, 1\]"),
        (np.moveaxis(IMAGES, -1, 1), r"uint8 \[2, 3, 48, 48\]"),
        (IMAGES[0], r"uint8 \[48, 48, 3\]"),
    ],
    ids=["floats", "integers", "grey", "channels first", "one image"],
)
def test_images_of_another_type_or_shape_have_no_scores_at_all(worker, images, given):
    with pytest.raises(ValueError, match=f"images are {given}.*; give uint8"):
        worker.score(images, [Prompt(0, RECORD["prompt"], RECORD)] * len(images))


def test_chunks_are_scored_together_and_a_failure_belongs_to_its_own_row(worker):
    """As many rows of each chunk as it has prompts, from a start on."""
    good, broken = Prompt(0, RECORD["prompt"], RECORD), Prompt(1, "a circle", {"include": [{"class": "circle"}]})
    first, second, third = worker.score_chunks([[good, broken], [good], [broken]], [0, 1, 0], IMAGES, IMAGES, IMAGES)
    assert first.failures["objects"].rows == (1,) and third.failures["objects"].rows == (0,) and not second.failures
    assert [one.valid["objects"].tolist() for one in (first, second, third)] == [[True, False], [True], [False]]


def test_values_that_are_not_one_an_image_are_failures():
    with pytest.raises(ValueError, match="values has shape"):
        checked(Result(np.ones(1), np.ones(2, bool)), 2)


def test_loading_errors_rise(tmp_path):
    with pytest.raises(UserError):
        RewardWorker({"clip": REWARDS["clip_score"].Config(path=str(tmp_path))})
