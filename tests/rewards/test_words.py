import pytest

from align_cluster.algorithms.srpo import NEGATIVE, POSITIVE
from align_cluster.rewards.aesthetic import Aesthetic
from align_cluster.rewards.clip_score import ClipScore
from align_cluster.rewards.hps import Hps
from align_cluster.rewards.pickscore import PickScore
from align_cluster.rewards.words import split


def test_words_are_what_a_phrase_has_between_its_marks():
    assert split("Natural-lighting, 4 cats. Über_fein") == ["Natural", "lighting", "cats", "Über", "fein"]


def test_the_embedded_tokenizer_knows_its_captions_words_and_no_others():
    known = ClipScore(ClipScore.Config()).vocabulary()
    assert all(known.knows(word) for word in split("on a light background"))
    assert not known.knows("lihgt") and known.nearest("lihgt") == "light"
    assert not known.knows("Painting") and known.nearest("xyzzyplugh") is None


def test_clips_byte_pairs_know_the_published_control_words():
    pytest.importorskip("open_clip", reason="the extra 'rewards' is not installed")
    known = Hps(Hps.Config()).vocabulary()
    assert all(known.knows(word) for phrase in (*POSITIVE, *NEGATIVE) for word in split(phrase))
    assert not known.knows("lihgting") and known.nearest("lihgting") == "lighting"


def test_a_tokenizer_that_is_not_here_or_not_there_is_none():
    assert PickScore(PickScore.Config(processor="nobody/nothing")).vocabulary() is None
    assert Aesthetic(Aesthetic.Config()).vocabulary() is None
