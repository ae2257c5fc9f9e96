"""Which prompts a step draws, with which seeds, in which chunks: pure functions of (run seed, step).

Nothing here knows how many workers there are, so the same groups come out on one core and on a cluster.
"""

import hashlib
from functools import lru_cache
from typing import Literal

from align_cluster.errors import UserError
from align_cluster.types import Chunk, Prompt

EVALUATION_STEP = -1  # `Chunk.step` of evaluation images: their seeds never meet those of training


def member_seed(seed: int, step: int, group: int, member: int) -> int:
    """Seed of one image: 63 bits of blake2b over (run seed, step, group, member)."""
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
    """Chunks of one training step, group by group.

    A group is the full grid of `group_size` initial noises x `conditions`, condition by condition: member m is noise
    m % group_size under condition m // group_size. With `same_noise` a whole group starts from one noise, with "step"
    all groups do.

    The run walks through the prompts in epochs, each one a permutation of all of them; where an epoch ends inside a
    step, the next one goes on there. So no prompt comes twice within an epoch and none is left out.
    """
    chunks: list[Chunk] = []
    for group in range(prompts_per_step):
        epoch, place = divmod(step * prompts_per_step + group, len(prompts))
        prompt = prompts[epoch_order(len(prompts), seed, epoch)[place]]
        chunks += _chunks(prompt, seed, step, group, group_size, chunk, conditions, same_noise)
    return chunks


def plan_evaluation(prompts: list[Prompt], count: int, images_per_prompt: int, chunk: int, seed: int) -> list[Chunk]:
    """Chunks of an evaluation over `count` distinct prompts, as many of each task as there are, tasks in turn.

    Which prompts are taken depends on their texts alone, so runs with different seeds are compared on the same ones,
    and a larger count adds to a smaller one.
    """
    chosen = spread(prompts, count)
    return [
        part
        for group, prompt in enumerate(chosen)
        for part in _chunks(prompt, seed, EVALUATION_STEP, group, images_per_prompt, chunk)
    ]


def spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """`count` prompts with distinct texts, taken from the tasks in turn. UserError where there are fewer."""
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
    """Permutation of range(count): indices sorted by their hash, so it needs no generator whose stream may change."""
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
