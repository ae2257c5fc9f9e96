from collections import Counter

import numpy as np

from align_cluster.learner.batching import assign_updates, make_micro_batches, rank_share, total_weights

from ..cases import each

SIZES = (3, 1, 4, 2, 5, 3, 3)


def step(sizes=SIZES, masked: float = 0.2):
    """Advantages of a step's chunks that name their sample, with some samples masked."""
    advantages = [np.array([100 * g + m + 1 for m in range(size)], dtype=np.float32) for g, size in enumerate(sizes)]
    rng = np.random.default_rng(0)
    return advantages, [rng.uniform(size=size) >= masked for size in sizes]


def bounds(updates: int) -> list[int]:
    """Where the rows of each update begin; chunks lie across."""
    return [update * sum(SIZES) // updates for update in range(updates + 1)]


def all_shares(micro_batches, world):
    """(micro-batch, chunk number in the step) of every rank, padding included."""
    for rank in range(world):
        mine, sources = rank_share(micro_batches, rank, world)
        yield [(item, sources[item.source]) for item in mine]


@each("micro_batch", [1, 2, 3, 5, 9])
@each("updates", [1, 2, 3, 7])
def test_every_sample_is_in_exactly_one_micro_batch(micro_batch, updates):
    advantages, valid = step()
    micro_batches = make_micro_batches(advantages, valid, bounds=bounds(updates), size=micro_batch)
    members = Counter((p.source, m) for p in micro_batches for m in range(p.start, p.stop))
    assert members == {(g, m): 1 for g, size in enumerate(SIZES) for m in range(size)}
    for item in micro_batches:
        assert 1 <= item.stop - item.start <= micro_batch
        rows = slice(item.start, item.stop)
        np.testing.assert_array_equal(item.weights, valid[item.source][rows])
        expected = np.where(valid[item.source][rows], advantages[item.source][rows], 0)
        np.testing.assert_array_equal(item.advantages, expected)
        assert item.weights.dtype == item.advantages.dtype == np.float32


@each("micro_batch", [1, 2, 3, 9])
@each("updates", [1, 2, 3, 7])
@each("world", [1, 2, 3, 4, 5])
def test_every_sample_counts_exactly_once_in_any_world(micro_batch, updates, world):
    advantages, valid = step()
    micro_batches = make_micro_batches(advantages, valid, bounds=bounds(updates), size=micro_batch)
    counted, rounds = Counter(), []
    for mine in all_shares(micro_batches, world):
        rounds.append([item.update for item, _ in mine])
        for item, source in mine:
            for member, weight, advantage in zip(
                range(item.start, item.stop), item.weights, item.advantages, strict=True
            ):
                if weight:
                    counted[source, member] += 1
                    assert advantage == advantages[source][member]
    assert counted == {(g, m): 1 for g in range(len(SIZES)) for m in range(SIZES[g]) if valid[g][m]}
    assert all(row == rounds[0] for row in rounds)  # collectives pair up: the same updates, as many rounds
    assert sorted(set(rounds[0])) == list(range(updates))


def test_padding_is_a_weightless_copy_of_a_micro_batch_of_the_same_update():
    advantages, valid = step(masked=0)
    micro_batches = make_micro_batches(advantages, valid, bounds=bounds(1), size=9)
    padded = [
        (rank, item)
        for rank, mine in enumerate(all_shares(micro_batches, 4))
        for item, _ in mine
        if not item.weights.any()
    ]
    assert [rank for rank, _ in padded] == [3]  # seven micro-batches on four ranks
    assert (padded[0][1].stop - padded[0][1].start) == len(padded[0][1].weights)


def test_the_total_weight_of_an_update_does_not_depend_on_the_world():
    advantages, valid = step()
    micro_batches = make_micro_batches(advantages, valid, bounds=bounds(3), size=2)
    totals = total_weights(micro_batches)
    assert set(totals) == {0, 1, 2} and sum(totals.values()) == sum(v.sum() for v in valid)
    for world in range(1, 6):
        shared = [item for mine in all_shares(micro_batches, world) for item, _ in mine]
        assert total_weights(shared) == totals


def test_a_rank_asks_only_for_the_chunks_that_it_works_on():
    advantages, valid = step()
    micro_batches = make_micro_batches(advantages, valid, bounds=bounds(1), size=2)
    for world in (2, 3):
        for rank in range(world):
            mine, sources = rank_share(micro_batches, rank, world)
            assert sources == sorted(set(sources)) and {item.source for item in mine} == set(range(len(sources)))
            assert len(sources) < len(SIZES) or world == 1


@each("size", [1, 2, 4, 30])
@each("updates", [1, 2, 3, 7])
def test_a_part_is_of_one_chunk_and_one_update_and_updates_take_the_rows_in_their_order(updates, size):
    edges, parts = bounds(updates), assign_updates(SIZES, bounds(updates), size)
    begins = np.cumsum([0, *SIZES])
    rows = [begins[part.source] + row for part in parts for row in range(part.start, part.stop)]
    assert rows == list(range(sum(SIZES)))
    for part in parts:
        assert edges[part.update] <= begins[part.source] + part.start < begins[part.source] + part.stop
        assert begins[part.source] + part.stop <= edges[part.update + 1] and part.stop - part.start <= size
    sizes = [Counter() for _ in range(updates)]
    for part in parts:
        sizes[part.update][part.source] = max(sizes[part.update][part.source], part.stop - part.start)
    for part in parts:
        assert part.stop - part.start >= sizes[part.update][part.source] - 1  # even parts


def test_a_masked_sample_has_neither_weight_nor_advantage_even_if_it_is_not_a_number():
    advantages, valid = step((3,), masked=0)
    advantages[0][1], valid[0][1] = np.nan, False
    (item,) = make_micro_batches(advantages, valid, bounds=[0, 3], size=3)
    np.testing.assert_array_equal(item.advantages, [1, 0, 3])
    np.testing.assert_array_equal(item.weights, [1, 0, 1])
