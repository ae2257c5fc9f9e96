import numpy as np
import pytest
from pydantic import ValidationError

from align_cluster.embedded import scene
from align_cluster.embedded.render import render
from align_cluster.rewards.clip_score import ClipScore
from align_cluster.rewards.sgp import Sgp

from .helpers import prompts

WORDS = {"positive": "on a light background", "negative": "on a dark background", "template": "{prompt} {word}"}


@pytest.fixture(scope="module")
def reward():
    made = Sgp(Sgp.Config(of={"kind": "clip_score", "scale": "srpo"}, **WORDS))
    made.load("cpu", 1)
    return made


def drawn(ground):
    """Pictures of two objects on the ground, and their prompts without it."""
    records = [record for record in scene.prompts("two_object", "train") if "background" not in record["prompt"]][:6]
    images = render([dict(record, prompt=record["prompt"] + ground) for record in records], 0)
    return images.permute(0, 2, 3, 1).numpy(), prompts([record["prompt"] for record in records])


def test_what_is_more_of_the_positive_word_scores_higher(reward):
    light, plain, dark = (
        reward.score(*drawn(ground)).values for ground in (" on a light background", "", " on a dark background")
    )
    assert (light > 0.1).all() and (dark < -0.1).all() and dark.mean() < plain.mean() < light.mean()


def test_it_is_the_difference_of_two_cosines_whatever_the_models_scale(reward):
    images, texts = drawn("")
    clip = ClipScore(ClipScore.Config())
    clip.load("cpu", 1)
    plus, minus = (
        clip.score(images, prompts([f"{prompt.text} {WORDS[side]}" for prompt in texts])).values
        for side in ("positive", "negative")
    )
    found = reward.score(images, texts)
    np.testing.assert_allclose(found.values, plus - minus, rtol=0, atol=1e-6)
    share = np.exp(100 * plus) / (np.exp(100 * plus) + np.exp(100 * minus))
    np.testing.assert_allclose(found.details["share"], share, rtol=0, atol=1e-4)
    assert found.valid.all()


def test_the_defaults_are_the_papers():
    config = Sgp.Config()
    assert (config.of.kind, config.of.version) == ("hps", "v2.1")
    assert (config.positive, config.negative, config.template) == ("Realistic photo", "CG Render", "{word}. {prompt}")


def test_settings_that_nothing_would_read_are_refused():
    with pytest.raises(ValidationError, match="without weight, which is to stand beside `of`"):
        Sgp.Config(of={"kind": "clip_score", "weight": 2.0})
    with pytest.raises(ValidationError):
        Sgp.Config(of={"kind": "geneval"})
    with pytest.raises(ValidationError, match="with {word} and {prompt}, each once"):
        Sgp.Config(template="a photo of {prompt}")  # both texts would be the same
