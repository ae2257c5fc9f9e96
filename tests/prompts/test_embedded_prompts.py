from collections import Counter

import pytest
from pydantic import ValidationError

from align_cluster.embedded import scene
from align_cluster.prompts.embedded import EmbeddedPrompts


def load(**settings):
    return EmbeddedPrompts(EmbeddedPrompts.Config(**settings)).load()


def test_every_task_has_the_same_number_of_turns():
    turns = Counter(prompt.task for prompt in load(tasks=["single_object", "colors", "counting"]))
    assert len(set(turns.values())) == 1


def test_without_even_every_prompt_has_one_turn():
    prompts = load(tasks=["colors", "counting"], even=False)
    assert len({prompt.text for prompt in prompts}) == len(prompts)


def test_ids_and_texts_name_the_same_prompts():
    prompts = load()
    assert len({prompt.id for prompt in prompts}) == len({(prompt.id, prompt.text) for prompt in prompts})
    assert len({prompt.id for prompt in prompts}) == len({prompt.text for prompt in prompts})


def test_training_and_held_out_prompts_never_meet():
    train, held_out = (load(tasks=scene.TASKS, split=split) for split in ("train", "held_out"))
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in held_out}


def test_at_least_50_distinct_prompts_of_each_task_are_held_out():
    counts = Counter(prompt.task for prompt in load(tasks=scene.TASKS, split="held_out", even=False))
    assert set(counts) == set(scene.TASKS) and min(counts.values()) >= 50


@pytest.mark.parametrize("tasks", [[], ["colours"], ["colors", "colors"]])
def test_bad_task_lists_are_refused(tasks):
    with pytest.raises(ValidationError):
        EmbeddedPrompts.Config(tasks=tasks)
