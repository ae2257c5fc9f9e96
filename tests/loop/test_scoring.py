"""What is scored together and what is looked for where that is given up, in front of a pool that works at once."""

from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from align_cluster.cluster.slots import GivenUp, InputLost
from align_cluster.config.plan import RewardPool
from align_cluster.loop.scoring import Rows, Scoring, count, halves
from align_cluster.types import Chunk, Failure, Prompt, Row, Scores

SIZES = (3, 4, 1, 2)
SEEDS = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])  # each row's seed is its number in the step
CHUNKS = [
    Chunk(0, number, tuple(Row(Prompt(int(s), "p"), 0, int(s), int(s), int(s)) for s in own))
    for number, own in enumerate(SEEDS)
]


@dataclass
class Images:
    """In place of a reference to the images of a chunk."""

    chunk: Chunk
    lost: bool = False


class Inline:
    """Does each call when it is asked for: an image's score is its number. The numbers in `deadly` kill a worker."""

    retries = 2

    def __init__(self, deadly=(), kind="unavailable"):
        self.deadly, self.kind = set(deadly), kind
        self.calls, self.batches, self.lost = deque(), [], 0
        self.ready_workers, self.has_room = [None], True

    def submit(self, key, method, prompts, starts, *images, tries=None):
        assert method == "score_chunks"
        self.calls.append((key, prompts, starts, images, tries or 1 + self.retries))

    def grow(self):
        pass

    def trim(self):
        pass

    def next(self):
        key, prompts, starts, images, tries = self.calls.popleft()
        if any(image.lost for image in images):
            return SimpleNamespace(key=key, value=InputLost("gone"))
        asked = [[prompt.id for prompt in own] for own in prompts]
        for own, start, image in zip(asked, starts, images, strict=True):
            assert own == image.chunk.seeds[start : start + len(own)]  # each prompt meets its own image
        self.batches.append(sum(asked, []))
        if self.deadly & set(self.batches[-1]):
            self.lost += tries
            return SimpleNamespace(key=key, value=GivenUp(self.kind, f"lost {tries} workers"))
        scores = [
            Scores({"a": np.array(own, float)}, {"a": np.ones(len(own), bool)}, {}, {}, {"a": 0.5}) for own in asked
        ]
        return SimpleNamespace(key=key, value=scores)


def scoring_of(pool, **settings) -> Scoring:
    made = Scoring(pool, RewardPool("a", ("a",), **({"workers": 1, "most": 1, "cpus": 0.0, "batch": 10} | settings)))
    made.begin(CHUNKS)
    return made


def finish(scoring: Scoring, found: dict | None = None) -> dict:
    """The scores of all chunks, once each."""
    found = {} if found is None else found
    while scoring.pool.calls:
        more = scoring.collect(scoring.pool.next())
        assert not more.keys() & found.keys()
        found |= more
    return found


def assert_only(found: dict, failed: set[int], kind: str = "unavailable") -> None:
    """Assert that the numbers in `failed` have no score because of a failure, and that all others have theirs."""
    assert found.keys() == {chunk.id for chunk in CHUNKS}
    for chunk in CHUNKS:
        scores, own = found[chunk.id], [seed in failed for seed in chunk.seeds]
        np.testing.assert_array_equal(scores.values["a"], np.where(own, np.nan, chunk.seeds))
        np.testing.assert_array_equal(scores.valid["a"], ~np.array(own))
        if any(own):
            failure = scores.failures["a"]
            assert failure == Failure(kind, failure.message, tuple(np.flatnonzero(own).tolist()))
        else:
            assert scores.failures == {}


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("deadly", range(10))
def test_an_image_that_kills_its_workers_is_found_and_fails_alone(deadly, ordered):
    pool = Inline({deadly})
    scoring = scoring_of(pool, ordered=ordered)
    for chunk in CHUNKS:
        scoring.add(chunk, Images(chunk))
    assert_only(finish(scoring), {deadly})
    assert pool.lost <= 3 * (1 + (not ordered)) + 4  # the first batch has three tries, each half of a batch one
    assert scoring.depth == 0 and not scoring.drawn and not scoring.found
    assert scoring.end()["reward/a/images_per_s"] > 0


def test_without_a_failure_nothing_is_cut():
    pool = Inline()
    scoring = scoring_of(pool)
    for chunk in CHUNKS[::-1]:
        scoring.add(chunk, Images(chunk))
    assert_only(finish(scoring), set())
    assert pool.batches == [list(range(10))]


@pytest.mark.parametrize("kind", ["unavailable", "timeout"])
def test_where_both_halves_are_given_up_the_worker_is_to_blame_and_the_search_ends(kind):
    pool = Inline(range(10), kind)
    scoring = scoring_of(pool)
    for chunk in CHUNKS:
        scoring.add(chunk, Images(chunk))
    assert_only(finish(scoring), set(range(10)), kind)
    assert pool.batches == [list(range(10)), list(range(5)), list(range(5, 10))] and pool.lost == 5


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_images_that_are_lost_during_the_search_are_drawn_again_and_searched_again(after):
    """All images go down with their node after some calls; what has come until then is not asked for again."""
    pool = Inline({4})
    scoring, images = scoring_of(pool), {chunk.id: Images(chunk) for chunk in CHUNKS}
    for chunk in CHUNKS:
        scoring.add(chunk, images[chunk.id])
    found = {}
    for _ in range(after):
        found |= scoring.collect(pool.next())
    for image in images.values():
        image.lost = True
    withdrawn = []
    while pool.calls:
        withdrawn += scoring.withdraw(pool.next())
    assert {chunk.id for chunk, _ in withdrawn} == {chunk.id for chunk in CHUNKS} - found.keys()
    assert all(reference is images[chunk.id] for chunk, reference in withdrawn)
    for chunk, _ in withdrawn:
        scoring.add(chunk, Images(chunk))
    assert_only(finish(scoring, found), {4})


def test_a_chunk_that_comes_again_because_another_pool_lost_it_stays_with_its_worker():
    pool = Inline({0})
    scoring = scoring_of(pool)
    for chunk in CHUNKS:
        scoring.add(chunk, Images(chunk))
    scoring.collect(pool.next())
    for chunk in CHUNKS:
        scoring.add(chunk, Images(chunk))
    assert_only(finish(scoring), {0})


def test_halves_keep_every_row_once_and_in_order():
    for first in range(4):
        for second in range(1, 5):
            parts = [Rows(CHUNKS[0], None, 0, first)] * bool(first) + [Rows(CHUNKS[1], None, 4 - second, 4)]
            left, right = halves(parts)
            assert count(left) == count(parts) // 2 and count(left) + count(right) == count(parts)
            listed = [[(p.chunk.number, row) for p in half for row in range(p.start, p.stop)] for half in (left, right)]
            assert sum(listed, []) == [(p.chunk.number, row) for p in parts for row in range(p.start, p.stop)]
