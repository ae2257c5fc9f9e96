"""Plan which prompts a step draws, with which seeds, in which chunks: pure functions of (run seed, step).

Nothing here knows the number of workers, so a laptop and a cluster plan the same groups.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from align_cluster.errors import UserError
from align_cluster.streams import hashed
from align_cluster.types import Chunk, Prompt, Row

EVALUATION_STEP = -1  # `Chunk.step` of evaluation images, so that their seeds differ from those of training


def member_seed(seed: int, step: int, group: int, member: int) -> int:
    """Return the seed of one image: 63 bits of blake2b over (run seed, step, group, member), for `streams.stream`."""
    return hashed(f"{seed}/{step}/{group}/{member}") >> 1


def plan_step(
    prompts: list[Prompt],
    seed: int,
    step: int,
    prompts_per_step: int,
    group_size: int,
    chunk: int,
    conditions: int = 1,
    same_noise: bool | Literal["step"] = False,
    bounds: Sequence[int] = (),
    anchor: bool = True,
) -> list[Chunk]:
    """Return the chunks of one training step: its rows, group by group, cut into chunks of at most `chunk` rows.

    No chunk goes across one of the row numbers `bounds`.

    A group is the full grid of `group_size` initial noises x `conditions`, condition by condition: member m is noise m
    % group_size under condition m // group_size. With `anchor` the first condition is the prompt's own, else none is.
    With `same_noise: True` a group starts from one noise, with "step" all groups do.

    The run goes through the prompts in epochs, and each epoch is a permutation of all prompts. If an epoch ends inside
    a step, the next epoch fills the step. So no prompt comes twice within an epoch, and none is left out.
    """
    rows: list[Row] = []
    for group in range(prompts_per_step):
        epoch, place = divmod(step * prompts_per_step + group, len(prompts))
        prompt = prompts[epoch_order(len(prompts), seed, epoch)[place]]
        rows += _group(prompt, seed, step, group, group_size, conditions, same_noise, anchor)
    return cut(step, rows, chunk, bounds)


def update_bounds(groups: int, members: int, updates: int) -> list[int]:
    """Return where the rows of a step's optimiser updates begin, and the number of all rows at the end: [updates + 1].

    Updates take whole groups, in their order, which is random already. Only where there are more updates than groups
    they share groups.
    """
    whole = groups >= updates
    units, size = (groups, members) if whole else (groups * members, 1)
    return [size * (update * units // updates) for update in range(updates + 1)]


def plan_evaluation(
    prompts: list[Prompt], count: int, images_per_prompt: int, chunk: int, seed: int, pieces: int = 1
) -> list[Chunk]:
    """Return the chunks of an evaluation over `count` distinct prompts, chosen by `spread`.

    A chunk has at most `chunk` rows, and their number is a multiple of `pieces` where there are enough rows.
    The choice depends on the prompts' texts alone, so runs with different seeds are compared on the same prompts, and a
    larger count extends a smaller one.
    """
    rows = [
        row
        for group, prompt in enumerate(spread(prompts, count))
        for row in _group(prompt, seed, EVALUATION_STEP, group, images_per_prompt)
    ]
    wanted = -(-len(rows) // (chunk * pieces)) * pieces
    return cut(EVALUATION_STEP, rows, chunk, [place * len(rows) // wanted for place in range(wanted)])


def cut(step: int, rows: Sequence[Row], size: int, bounds: Sequence[int] = ()) -> list[Chunk]:
    """Cut rows into chunks of at most `size`, and at each of the row numbers `bounds`. Between these, chunks differ by
    one row at most."""
    spans = chunk_spans(len(rows), size, bounds)
    return [Chunk(step, number, tuple(rows[first:last])) for number, (first, last) in enumerate(spans)]


def chunk_spans(count: int, size: int, bounds: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Return the first row and the end of each chunk that `cut` makes of `count` rows."""
    edges = sorted({0, *bounds, count})
    return [span for first, last in pairwise(edges) for span in even_spans(first, last, size)]


def even_spans(first: int, last: int, size: int) -> list[tuple[int, int]]:
    """Cut the numbers from `first` to `last` into spans of at most `size` that differ by one in length at most."""
    count = -(-(last - first) // size)
    edges = [first + place * (last - first) // count for place in range(count + 1)] if count else []
    return list(pairwise(edges))


def spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """Choose `count` prompts with distinct texts, taking one from each task in turn.

    Raises UserError if there are fewer distinct prompts.
    """
    distinct = {prompt.text: prompt for prompt in reversed(prompts)}
    by_task: dict[str, list[Prompt]] = {prompt.task: [] for prompt in prompts}
    for prompt in sorted(distinct.values(), key=lambda prompt: (hashed(prompt.text), prompt.text)):
        by_task[prompt.task].append(prompt)
    if count > len(distinct):
        raise UserError(
            f"an evaluation of {count} prompts needs as many different ones, and there are {len(distinct)}; "
            f"set evaluate.count to at most {len(distinct)}"
        )
    rounds = max(map(len, by_task.values()))
    turns = [task[place] for place in range(rounds) for task in by_task.values() if place < len(task)]
    return turns[:count]


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return a permutation of range(count): the indices sorted by their hash.

    The stream of a random generator may change between versions; a hash does not.
    """
    return tuple(sorted(range(count), key=lambda index: (hashed(f"{seed}/epoch {epoch}/{index}"), index)))


def _group(
    prompt: Prompt,
    seed: int,
    step: int,
    group: int,
    noises: int,
    conditions: int = 1,
    same_noise: bool | Literal["step"] = False,
    anchor: bool = True,
) -> list[Row]:
    first_group = 0 if same_noise == "step" else group
    return [
        Row(
            prompt,
            group,
            member,
            member_seed(seed, step, group, member),
            member_seed(seed, step, first_group, 0 if same_noise else member % noises),
            member // noises + (not anchor),
        )
        for member in range(noises * conditions)
    ]
