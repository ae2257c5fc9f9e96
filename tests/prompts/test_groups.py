import hashlib
from collections import Counter
from itertools import pairwise, product

import pytest

from align_cluster.errors import UserError
from align_cluster.prompts.groups import (
    EVALUATION_STEP,
    cut,
    epoch_order,
    even_spans,
    member_seed,
    plan_evaluation,
    plan_step,
    spread,
    update_bounds,
)
from align_cluster.types import Prompt

from ..cases import each

PROMPTS = [Prompt(i, f"prompt {i}", {"tag": ("colors", "counting", "ocr")[i % 3]}) for i in range(23)]


def rows_of(chunks):
    return [row for chunk in chunks for row in chunk.rows]


def of_group(chunks, group):
    """The rows of a group, which must be its members in order."""
    own = [row for row in rows_of(chunks) if row.group == group]
    assert [row.member for row in own] == list(range(len(own))) and len({row.prompt for row in own}) == 1
    return own


def prompts_of(chunks):
    """The prompt of each group, in order."""
    return list({row.group: row.prompt for row in rows_of(chunks)}.values())


def test_seeds_are_the_documented_hash():
    assert member_seed(0, 0, 0, 0) == 5854343820274218872
    assert member_seed(7, 123, 4, 11) == 7597653021170953619
    digest = hashlib.blake2b(b"7/123/4/11", digest_size=8).digest()
    assert member_seed(7, 123, 4, 11) == int.from_bytes(digest, "little") // 2 < 2**63


def test_the_epoch_order_is_golden():
    assert epoch_order(8, 0, 0) == (7, 3, 0, 6, 1, 4, 5, 2)
    assert epoch_order(8, 0, 1) == (5, 0, 7, 6, 1, 3, 4, 2)


def test_every_member_of_every_step_has_its_own_seed():
    seeds = [seed for step in range(40) for chunk in plan_step(PROMPTS, 5, step, 4, 6, 3) for seed in chunk.seeds]
    seeds += [seed for chunk in plan_evaluation(PROMPTS, 20, 6, 3, 5) for seed in chunk.seeds]
    assert len(set(seeds)) == len(seeds) == 40 * 4 * 6 + 20 * 6


@pytest.mark.parametrize("prompts_per_step", [1, 4, 7, 23])
def test_an_epoch_covers_every_prompt_once_and_goes_on_across_steps(prompts_per_step):
    steps = 23 * 3
    drawn = [p.id for step in range(steps) for p in prompts_of(plan_step(PROMPTS, 1, step, prompts_per_step, 2, 3))]
    assert len(drawn) == steps * prompts_per_step
    for start in range(0, len(drawn), 23):
        assert sorted(drawn[start : start + 23]) == list(range(23))
    assert drawn[:23] != drawn[23:46]


def test_a_step_is_the_same_whichever_steps_were_planned_before():
    fresh = plan_step(PROMPTS, 2, 17, 5, 12, 4)
    for step in (0, 30, 17):
        again = plan_step(PROMPTS, 2, step, 5, 12, 4)
    assert again == fresh


@pytest.mark.parametrize(
    ("group_size", "chunk", "sizes"),
    [(12, 12, [12, 12]), (12, 48, [24]), (12, 9, [8, 8, 8]), (7, 3, [2, 3, 3, 3, 3]), (2, 3, [2, 2])],
)
def test_chunks_are_consecutive_rows_of_all_groups_and_cutting_changes_none(group_size, chunk, sizes):
    chunks = plan_step(PROMPTS, 3, 2, 2, group_size, chunk)
    assert [len(part) for part in chunks] == sizes
    assert [part.id for part in chunks] == [(2, number) for number in range(len(sizes))]
    for group in (0, 1):
        own = of_group(chunks, group)
        assert [row.seed for row in own] == [member_seed(3, 2, group, m) for m in range(group_size)]
    assert rows_of(chunks) == rows_of(plan_step(PROMPTS, 3, 2, 2, group_size, 1))
    assert [row.group for row in rows_of(chunks)] == [0] * group_size + [1] * group_size


def test_a_chunk_says_which_texts_it_needs_and_which_of_them_perturbed():
    (chunk,) = plan_step(PROMPTS, 3, 2, 2, 2, 12, conditions=3)
    texts = [prompt.text for prompt in prompts_of([chunk])]
    assert chunk.texts == chunk.perturbed_texts == texts and len(set(texts)) == 2
    first, second, third = plan_step(PROMPTS, 3, 2, 1, 2, 2, conditions=3)
    assert first.texts == second.texts == third.texts == second.perturbed_texts and first.perturbed_texts == []


# ----------------------------------------------------------------------------------------- shares of updates and chunks

STEPS = [
    (groups, members, updates, chunk)
    for groups, members, updates, chunk in product((1, 2, 3, 4, 7, 12), (1, 2, 5, 24), (1, 2, 3, 5), (1, 4, 7, 48))
    if updates <= groups * members
]


def differ_by_one_at_most(sizes):
    return min(sizes) > 0 and max(sizes) - min(sizes) <= 1


@each(("groups", "members", "updates", "chunk"), STEPS)
def test_updates_share_out_whole_groups_evenly_and_members_only_where_groups_are_fewer(groups, members, updates, chunk):
    bounds = update_bounds(groups, members, updates)
    sizes = [last - first for first, last in pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == groups * members and len(sizes) == updates
    if groups >= updates:
        assert all(bound % members == 0 for bound in bounds) and differ_by_one_at_most([n // members for n in sizes])
    else:
        assert differ_by_one_at_most(sizes)


@each(("groups", "members", "updates", "chunk"), STEPS)
def test_every_row_is_in_one_chunk_and_no_chunk_goes_across_a_bound(groups, members, updates, chunk):
    bounds, rows = update_bounds(groups, members, updates), list(range(groups * members))
    for edges in ((), bounds):
        chunks = cut(5, rows, chunk, edges)
        assert [row for part in chunks for row in part.rows] == rows
        assert [part.id for part in chunks] == [(5, number) for number in range(len(chunks))]
        for first, last in pairwise(edges or (0, len(rows))):
            inside = [len(part) for part in chunks if first <= part.rows[0] and part.rows[-1] < last]
            assert sum(inside) == last - first and len(inside) == -(-(last - first) // chunk)
            assert differ_by_one_at_most(inside) and max(inside) <= chunk
        assert sum(len(part) for part in chunks) == len(rows)
    whole = plan_step(PROMPTS, 0, 0, groups, members, chunk, bounds=bounds)
    assert [len(part) for part in whole] == [len(part) for part in chunks]


@each(("first", "count", "size"), product((0, 5), range(20), (1, 2, 3, 7, 30)))
def test_even_spans_follow_one_another_and_are_as_few_and_as_even_as_they_can(first, count, size):
    spans = even_spans(first, first + count, size)
    assert [number for span in spans for number in range(*span)] == list(range(first, first + count))
    assert len(spans) == -(-count // size)
    assert not spans or (differ_by_one_at_most([b - a for a, b in spans]) and max(b - a for a, b in spans) <= size)


def test_the_run_seed_changes_prompts_and_noise():
    first, second = (plan_step(PROMPTS, seed, 0, 5, 2, 2) for seed in (0, 1))
    assert prompts_of(first) != prompts_of(second) and first[0].seeds != second[0].seeds


def test_an_evaluation_takes_the_tasks_in_turn():
    tasks = Counter(prompt.task for prompt in prompts_of(plan_evaluation(PROMPTS, 9, 1, 4, 0)))
    assert tasks == {"colors": 3, "counting": 3, "ocr": 3}


def test_an_evaluation_takes_more_of_the_others_where_a_task_runs_out():
    few = [Prompt(0, "only one", {"tag": "ocr"}), *[Prompt(i, f"p{i}", {"tag": "colors"}) for i in range(1, 9)]]
    assert Counter(p.task for p in spread(few, 6)) == {"ocr": 1, "colors": 5}


def test_runs_with_different_seeds_are_evaluated_on_the_same_prompts():
    first, second = (plan_evaluation(PROMPTS, 6, 4, 4, seed) for seed in (0, 9))
    assert [c.prompts for c in first] == [c.prompts for c in second]
    assert all(a.seeds != b.seeds for a, b in zip(first, second, strict=True))
    assert {chunk.step for chunk in first} == {EVALUATION_STEP}


def test_a_larger_evaluation_adds_to_a_smaller_one_and_file_order_does_not_matter():
    assert spread(PROMPTS, 12)[:5] == spread(PROMPTS, 5)
    assert {p.text for p in spread(PROMPTS[::-1], 12)} == {p.text for p in spread(PROMPTS, 12)}


def test_an_evaluation_counts_distinct_texts():
    twice = [*PROMPTS, *PROMPTS]
    assert spread(twice, 23) == spread(PROMPTS, 23)
    with pytest.raises(UserError, match="24 prompts.*there are 23; set evaluate.count to at most 23"):
        plan_evaluation(twice, 24, 1, 1, 0)


# ----------------------------------------------------------------------------------------- grids of noises x conditions

GRIDS = [(4, 12), (2, 4), (8, 3), (1, 5), (3, 2)]


def group_of(chunks, group):
    """(seed, noise, variant) of each member of a group, in order."""
    return [(row.seed, row.noise, row.variant) for row in of_group(chunks, group)]


@pytest.mark.parametrize(("noises", "conditions"), GRIDS)
def test_a_group_is_the_full_grid_condition_by_condition_however_it_is_cut(noises, conditions):
    size = noises * conditions
    for chunk in range(1, 2 * size + 2):
        chunks = plan_step(PROMPTS, 3, 2, 2, noises, chunk, conditions)
        for group in (0, 1):
            members = group_of(chunks, group)
            assert [variant for _, _, variant in members] == [k for k in range(conditions) for _ in range(noises)]
            own = [member_seed(3, 2, group, g) for g in range(noises)]
            assert [noise for _, noise, _ in members] == own * conditions
            assert [seed for seed, _, _ in members] == [member_seed(3, 2, group, m) for m in range(size)]
            assert len({(noise, variant) for _, noise, variant in members}) == size


def test_different_prompts_and_steps_start_from_different_noises_and_all_members_have_their_own_seed():
    members = [group_of(plan_step(PROMPTS, 5, step, 4, 3, 6, 4), g) for step in range(20) for g in range(4)]
    assert len({noise for group in members for _, noise, _ in group}) == 20 * 4 * 3
    assert len({seed for group in members for seed, _, _ in group}) == 20 * 4 * 3 * 4


@pytest.mark.parametrize("conditions", [1, 3])
def test_with_same_noise_a_group_has_one_noise_of_its_own_and_its_members_still_their_seeds(conditions):
    chunks = plan_step(PROMPTS, 5, 1, 4, 6, 3, conditions, same_noise=True)
    groups = [group_of(chunks, group) for group in range(4)]
    for group, members in enumerate(groups):
        assert {noise for _, noise, _ in members} == {member_seed(5, 1, group, 0)}
        assert len({seed for seed, _, _ in members}) == 6 * conditions
        assert [variant for _, _, variant in members] == [k for k in range(conditions) for _ in range(6)]
    assert len({members[0][1] for members in groups}) == 4


def test_by_default_every_row_has_its_own_noise_and_the_prompts_own_condition():
    plain = rows_of(plan_step(PROMPTS, 5, 1, 4, 6, 3))
    assert plain == rows_of(plan_step(PROMPTS, 5, 1, 4, 6, 3, conditions=1, same_noise=False))
    assert all(row.noise == row.seed and row.variant == 0 for row in plain)


def test_exploring_changes_neither_the_prompts_of_a_step_nor_how_their_originals_are_drawn():
    plain, explored = (rows_of(plan_step(PROMPTS, 5, 1, 4, 6, 6, conditions)) for conditions in (1, 3))
    assert [row for row in explored if row.variant == 0] == plain and len(explored) == 3 * len(plain)


def test_an_evaluation_draws_the_prompts_themselves():
    chunks = plan_evaluation(PROMPTS, 5, 4, 2, 0)
    assert all(chunk.noises == chunk.seeds and not chunk.perturbed_texts for chunk in chunks)


@each(("count", "images", "chunk", "pieces"), product((1, 5, 23), (1, 4), (1, 6, 48), (1, 2, 8)))
def test_an_evaluation_has_full_chunks_in_a_number_that_keeps_all_samplers_busy(count, images, chunk, pieces):
    chunks, total = plan_evaluation(PROMPTS, count, images, chunk, 0, pieces), count * images
    assert rows_of(chunks) == rows_of(plan_evaluation(PROMPTS, count, images, 1, 0))
    assert [prompt.text for prompt in prompts_of(chunks)] == [prompt.text for prompt in spread(PROMPTS, count)]
    wanted = -(-total // (chunk * pieces)) * pieces  # the fewest chunks that are a multiple of the pieces
    sizes = [len(part) for part in chunks]
    assert len(chunks) == min(wanted, total) and max(sizes) <= chunk and differ_by_one_at_most(sizes)


def test_with_same_noise_for_a_step_all_groups_of_it_begin_alike_and_the_next_step_does_not():
    first, second = (plan_step(PROMPTS, 5, step, 4, 1, 1, same_noise="step") for step in (0, 1))
    noises = [{noise for chunk in chunks for noise in chunk.noises} for chunks in (first, second)]
    assert len(noises[0]) == len(noises[1]) == 1 and noises[0] != noises[1]
    assert len({seed for chunk in first for seed in chunk.seeds}) == 4
