import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from align_cluster.embedded import scene
from align_cluster.embedded.render import render
from align_cluster.rewards.ocr import READABLE_SIDE, Ocr, edit_distance, enlarged, plain, similarity
from align_cluster.types import Prompt


@pytest.mark.parametrize(
    ("read", "target", "expected"),
    [
        ("hello", "hello", 1.0),
        ("xxhelloworld", "hello", 1.0),  # more text than asked for
        ("hallo", "hello", 0.8),  # one edit of five
        ("helo", "hello", 0.8),
        ("", "hello", 0.0),
        ("a long text without it", "hello", 0.0),  # never below zero
    ],
)
def test_similarity(read, target, expected):
    assert similarity(read, target) == pytest.approx(expected)


def test_edit_distance_of_known_pairs():
    known = {("kitten", "sitting"): 3, ("", "abc"): 3, ("abc", "abc"): 0, ("flaw", "lawn"): 2, ("ab", "ba"): 2}
    for (a, b), distance in known.items():
        assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_plain_text_has_no_case_no_spaces_and_no_wide_letters():
    assert plain(" Open\tNOW\n") == "opennow"
    assert plain("\uff45g\uff47") == "egg"


def test_small_images_are_enlarged_by_a_whole_factor():
    assert enlarged(np.zeros((48, 48, 3), np.uint8)).shape == (192, 192, 3)
    assert enlarged(np.zeros((100, 150, 3), np.uint8)).shape == (200, 300, 3)
    large = np.zeros((READABLE_SIDE, 300, 3), np.uint8)
    assert enlarged(large) is large


@pytest.fixture(scope="module")
def reward():
    pytest.importorskip("rapidocr", reason="the extra 'rewards' is not installed")
    reward = Ocr(Ocr.Config())
    reward.load("cpu", 1)
    return reward


def sign(*lines):
    image = Image.new("RGB", (256, 256), "white")
    for row, line in enumerate(lines):
        ImageDraw.Draw(image).text((30, 60 + 80 * row), line, font=ImageFont.load_default(48), fill="black")
    return np.asarray(image)[None]


def asking(text):
    return [Prompt(0, f'a sign that says "{text}"')]


def test_reads_rendered_words(reward):
    records = scene.prompts("ocr", "held_out")[:40]
    images = render(list(records), 5).permute(0, 2, 3, 1).numpy()
    result = reward.score(images, [Prompt(i, record["prompt"], record) for i, record in enumerate(records)])
    assert result.valid.all()
    assert result.details["exact"].mean() >= 0.95
    assert result.values.mean() >= 0.98


def test_exact_superset_one_edit_and_nothing(reward):
    assert reward.score(sign("HELLO"), asking("Hello")).values[0] == 1
    longer = reward.score(sign("HELLO", "WORLD"), asking("Hello"))
    assert (longer.values[0], longer.details["exact"][0]) == (1, 0)
    assert reward.score(sign("HELLO", "WORLD"), asking("hello world")).values[0] == 1
    assert reward.score(sign("HALLO"), asking("Hello")).values[0] == pytest.approx(0.8)
    assert reward.score(np.full((1, 256, 256, 3), 255, np.uint8), asking("Hello")).values[0] == 0


def test_metadata_goes_before_the_prompts_quotes_and_no_text_is_invalid(reward):
    images = np.repeat(sign("HELLO"), 3, axis=0)
    prompts = [Prompt(0, 'says "world"', {"text": "hello"}), Prompt(1, "no text"), Prompt(2, 'says ""')]
    result = reward.score(images, prompts)
    assert result.valid.tolist() == [True, False, False]
    assert result.values[0] == 1 and np.isnan(result.values[1:]).all()


def test_the_same_image_twice_scores_the_same(reward):
    twice = reward.score(np.repeat(sign("HALLO"), 2, axis=0), asking("Hello") * 2).values
    assert twice[0] == twice[1]
