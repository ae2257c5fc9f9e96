import hashlib
from collections import Counter

import pytest

from align_cluster.errors import UserError
from align_cluster.prompts.groups import EVALUATION_STEP, epoch_order, member_seed, plan_evaluation, plan_step, spread
from align_cluster.types import Chunk, Prompt

PROMPTS = [Prompt(i, f"prompt {i}", {"tag": ("colors", "counting", "ocr")[i % 3]}) for i in range(23)]


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
    drawn = [c.prompt.id for step in range(steps) for c in plan_step(PROMPTS, 1, step, prompts_per_step, 2, 2)]
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
    ("group_size", "chunk", "sizes"), [(12, 12, [12]), (12, 4, [4, 4, 4]), (7, 3, [3, 3, 1]), (2, 5, [2])]
)
def test_chunks_are_consecutive_members_and_cutting_changes_no_seed(group_size, chunk, sizes):
    chunks = [part for part in plan_step(PROMPTS, 3, 2, 2, group_size, chunk) if part.group == 1]
    assert [len(part.seeds) for part in chunks] == sizes
    assert [part.first for part in chunks] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert [seed for part in chunks for seed in part.seeds] == [member_seed(3, 2, 1, m) for m in range(group_size)]
    assert len({part.id for part in chunks}) == len(chunks) and {part.prompt for part in chunks} == {chunks[0].prompt}


def test_the_run_seed_changes_prompts_and_noise():
    first, second = (plan_step(PROMPTS, seed, 0, 5, 2, 2) for seed in (0, 1))
    assert [c.prompt for c in first] != [c.prompt for c in second] and first[0].seeds != second[0].seeds


def test_an_evaluation_takes_the_tasks_in_turn():
    tasks = Counter(chunk.prompt.task for chunk in plan_evaluation(PROMPTS, 9, 1, 4, 0))
    assert tasks == {"colors": 3, "counting": 3, "ocr": 3}


def test_an_evaluation_takes_more_of_the_others_where_a_task_runs_out():
    few = [Prompt(0, "only one", {"tag": "ocr"}), *[Prompt(i, f"p{i}", {"tag": "colors"}) for i in range(1, 9)]]
    assert Counter(p.task for p in spread(few, 6)) == {"ocr": 1, "colors": 5}


def test_runs_with_different_seeds_are_evaluated_on_the_same_prompts():
    first, second = (plan_evaluation(PROMPTS, 6, 4, 4, seed) for seed in (0, 9))
    assert [c.prompt for c in first] == [c.prompt for c in second]
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
    own = [chunk for chunk in chunks if chunk.group == group]
    assert [chunk.first for chunk in own] == [sum(len(c.seeds) for c in own[:i]) for i in range(len(own))]
    return [member for chunk in own for member in zip(chunk.seeds, chunk.noises, chunk.variants, strict=True)]


@pytest.mark.parametrize(("noises", "conditions"), GRIDS)
def test_a_group_is_the_full_grid_condition_by_condition_however_it_is_cut(noises, conditions):
    size = noises * conditions
    for chunk in [d for d in range(1, size + 1) if size % d == 0]:
        chunks = plan_step(PROMPTS, 3, 2, 2, noises, chunk, conditions)
        assert all(len(part.seeds) == len(part.noises) == len(part.variants) == chunk for part in chunks)
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


def test_one_condition_and_own_noises_are_chunks_that_say_nothing_of_either():
    plain = [
        Chunk(chunk.step, chunk.group, chunk.first, chunk.prompt, chunk.seeds)
        for chunk in plan_step(PROMPTS, 5, 1, 4, 6, 3, conditions=1, same_noise=False)
    ]
    assert plan_step(PROMPTS, 5, 1, 4, 6, 3) == plain
    assert all(chunk.noises == chunk.seeds and chunk.variants == (0,) * 3 for chunk in plain)


def test_exploring_changes_neither_the_prompts_of_a_step_nor_how_their_originals_are_drawn():
    plain, explored = (plan_step(PROMPTS, 5, 1, 4, 6, 6, conditions) for conditions in (1, 3))
    originals = [chunk for chunk in explored if chunk.first == 0]
    assert originals == plain and len(explored) == 3 * len(plain)


def test_an_evaluation_draws_the_prompts_themselves():
    chunks = plan_evaluation(PROMPTS, 5, 4, 2, 0)
    assert all(chunk.noises == chunk.seeds and not any(chunk.variants) for chunk in chunks)


def test_with_same_noise_for_a_step_all_groups_of_it_begin_alike_and_the_next_step_does_not():
    first, second = (plan_step(PROMPTS, 5, step, 4, 1, 1, same_noise="step") for step in (0, 1))
    noises = [{noise for chunk in chunks for noise in chunk.noises} for chunks in (first, second)]
    assert len(noises[0]) == len(noises[1]) == 1 and noises[0] != noises[1]
    assert len({seed for chunk in first for seed in chunk.seeds}) == 4
