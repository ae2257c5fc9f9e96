"""Plan which prompts a step draws, with which seeds, in which chunks: pure functions of (run seed, step).

Nothing here knows the number of workers, so a laptop and a cluster plan the same groups.
"""

import hashlib
from functools import lru_cache
from typing import Literal

from align_cluster.errors import UserError
from align_cluster.types import Chunk, Prompt

EVALUATION_STEP = -1  # `Chunk.step` of evaluation images, so that their seeds differ from those of training


def member_seed(seed: int, step: int, group: int, member: int) -> int:
    """Return the seed of one image: 63 bits of blake2b over (run seed, step, group, member)."""
    return _digest(f"{seed}/{step}/{group}/{member}") >> 1


def plan_step(
    prompts: list[Prompt],
    seed: int,
    step: int,
    prompts_per_step: int,
    group_size: int,
    chunk: int,
    conditions: int = 1,
    same_noise: bool | Literal["step"] = False,
) -> list[Chunk]:
    """Return the chunks of one training step, group by group.

    A group is the full grid of `group_size` initial noises x `conditions`, condition by condition: member m is noise m
    % group_size under condition m // group_size. With `same_noise: True` a group starts from one noise, with "step" all
    groups do.

    The run goes through the prompts in epochs, and each epoch is a permutation of all prompts. If an epoch ends inside
    a step, the next epoch fills the step. So no prompt comes twice within an epoch, and none is left out.
    """
    chunks: list[Chunk] = []
    for group in range(prompts_per_step):
        epoch, place = divmod(step * prompts_per_step + group, len(prompts))
        prompt = prompts[epoch_order(len(prompts), seed, epoch)[place]]
        chunks += _chunks(prompt, seed, step, group, group_size, chunk, conditions, same_noise)
    return chunks


def plan_evaluation(prompts: list[Prompt], count: int, images_per_prompt: int, chunk: int, seed: int) -> list[Chunk]:
    """Return the chunks of an evaluation over `count` distinct prompts, chosen by `spread`.

    The choice depends on the prompts' texts alone, so runs with different seeds are compared on the same prompts, and a
    larger count extends a smaller one.
    """
    chosen = spread(prompts, count)
    return [
        part
        for group, prompt in enumerate(chosen)
        for part in _chunks(prompt, seed, EVALUATION_STEP, group, images_per_prompt, chunk)
    ]


def spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """Choose `count` prompts with distinct texts, taking one from each task in turn.

    Raises UserError if there are fewer distinct prompts.
    """
    distinct = {prompt.text: prompt for prompt in reversed(prompts)}
    by_task: dict[str, list[Prompt]] = {prompt.task: [] for prompt in prompts}
    for prompt in sorted(distinct.values(), key=lambda prompt: (_digest(prompt.text), prompt.text)):
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
    return tuple(sorted(range(count), key=lambda index: (_digest(f"{seed}/epoch {epoch}/{index}"), index)))


def _chunks(
    prompt: Prompt,
    seed: int,
    step: int,
    group: int,
    noises: int,
    chunk: int,
    conditions: int = 1,
    same_noise: bool | Literal["step"] = False,
) -> list[Chunk]:
    chunks = []
    for first in range(0, noises * conditions, chunk):
        members = range(first, min(first + chunk, noises * conditions))
        seeds = tuple(member_seed(seed, step, group, m) for m in members)
        first_group = 0 if same_noise == "step" else group
        starts = tuple(member_seed(seed, step, first_group, 0 if same_noise else m % noises) for m in members)
        chunks.append(Chunk(step, group, first, prompt, seeds, starts, tuple(m // noises for m in members)))
    return chunks


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
