"""What a store keeps and what it lets go. tests/system/test_conditions.py has the store itself, on Ray."""

import sys
import weakref

from align_cluster.loop.conditions import Recent, Stored


class Reference:
    """Stands for a reference to an object: it lives while somebody holds it."""


def stored(nbytes: int) -> Stored:
    return Stored("key", nbytes, Reference())


def fill(recent: Recent, kind: str, texts: str, nbytes: int = 10) -> str:
    """Need `texts`, one letter each, and add what is missing; returns what was missing."""
    missing = recent.need(kind, list(texts))
    for text in missing:
        recent.add(kind, text, stored(nbytes))
    return "".join(missing)


def kept(recent: Recent, kind: str, texts: str) -> str:
    return "".join(text for text in texts if recent.find(kind, text))


def test_what_was_needed_longest_ago_goes_first():
    recent = Recent(50)
    assert fill(recent, "condition", "abc") == "abc"
    assert fill(recent, "condition", "de") == "de"
    assert kept(recent, "condition", "abcde") == "abcde" and recent.nbytes == 50
    assert fill(recent, "condition", "a") == ""  # so that b is the oldest
    assert fill(recent, "condition", "fg") == "fg"
    assert kept(recent, "condition", "abcdefg") == "adefg" and recent.nbytes == 50


def test_what_is_needed_stays_even_where_it_exceeds_the_bound():
    recent = Recent(25)
    fill(recent, "condition", "ab")
    assert fill(recent, "condition", "bcdef") == "cdef"
    assert kept(recent, "condition", "abcdef") == "bcdef" and recent.nbytes == 50
    fill(recent, "condition", "g")
    assert kept(recent, "condition", "abcdefg") == "fg" and recent.nbytes == 20


def test_kinds_share_the_bound_and_let_go_of_their_own_texts_only():
    recent = Recent(60)
    fill(recent, "perturbation", "ab")
    fill(recent, "condition", "ab")
    fill(recent, "condition", "cdef")  # an evaluation: its texts have no perturbations
    assert kept(recent, "condition", "abcdef") == "cdef" and kept(recent, "perturbation", "abcdef") == "ab"
    assert fill(recent, "perturbation", "cd") == "cd"
    assert kept(recent, "condition", "cdef") == "cdef" and kept(recent, "perturbation", "abcd") == "cd"


def test_a_training_steps_conditions_outlive_an_evaluation_that_leaves_room():
    recent = Recent(100)
    fill(recent, "condition", "abc")
    fill(recent, "condition", "defg")
    assert fill(recent, "condition", "abc") == ""


def test_a_kind_that_is_forgotten_is_asked_for_again_and_takes_no_room():
    recent = Recent(100)
    fill(recent, "perturbation", "ab")
    fill(recent, "perturbation", "bc")
    fill(recent, "condition", "ab")
    recent.forget("perturbation")
    assert recent.nbytes == 20 and kept(recent, "perturbation", "abc") == "" and kept(recent, "condition", "ab") == "ab"
    assert fill(recent, "perturbation", "ab") == "ab"


def test_a_text_is_asked_for_once_however_often_it_is_named():
    assert Recent(100).need("condition", list("aabba")) == ["a", "b"]


def test_references_are_let_go_and_nothing_else_is_kept_of_a_text():
    recent, alive = Recent(20), weakref.WeakSet()
    sizes = []
    for number in range(0, 2000, 2):
        texts = [f"text {number}", f"text {number + 1}"]
        for text in recent.need("condition", texts):
            recent.add("condition", text, stored(5))
            alive.add(recent.find("condition", text).reference)
        sizes.append(sys.getsizeof(recent.spare) + sys.getsizeof(recent.needed["condition"]))
        assert recent.find("condition", texts[0]) and len(recent.spare) + 2 <= 4
    assert len(alive) == 4 and recent.nbytes == 20 and max(sizes) == max(sizes[:50])
