import json
from collections import Counter

import pytest

from align_cluster.prompts.files import parse
from align_cluster.prompts.geneval import CLASSES, COLORS, TASKS, GenevalPrompts, scene, shares

EVEN = dict.fromkeys(TASKS, 1)


def load(**settings):
    return GenevalPrompts(GenevalPrompts.Config(**settings)).load()


def test_the_vocabulary_is_80_classes_and_10_colours():
    assert len(set(CLASSES)) == 80 and len(set(COLORS)) == 10
    assert {"fire hydrant", "computer mouse", "tv remote", "hair drier", "potted plant"} <= set(CLASSES)


@pytest.mark.parametrize(
    "record",
    [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {
            "tag": "two_object",
            "include": [{"class": "toaster", "count": 1}, {"class": "oven", "count": 1}],
            "prompt": "a photo of a toaster and an oven",
        },
        {
            "tag": "counting",
            "include": [{"class": "handbag", "count": 4}],
            "exclude": [{"class": "handbag", "count": 5}],
            "prompt": "a photo of four handbags",
        },
        {
            "tag": "colors",
            "include": [{"class": "fire hydrant", "count": 1, "color": "blue"}],
            "prompt": "a photo of a blue fire hydrant",
        },
        {
            "tag": "position",
            "include": [
                {"class": "teddy bear", "count": 1},
                {"class": "dog", "count": 1, "position": ["right of", 0]},
            ],
            "prompt": "a photo of a dog right of a teddy bear",
        },
        {
            "tag": "color_attr",
            "include": [
                {"class": "skis", "count": 1, "color": "green"},
                {"class": "airplane", "count": 1, "color": "brown"},
            ],
            "prompt": "a photo of a green skis and a brown airplane",
        },
    ],
    ids=lambda record: record["tag"],
)
def test_records_of_the_published_set_are_generated_word_for_word(record):
    size, make = TASKS[record["tag"]]
    if record["tag"] == "color_attr":  # half a million prompts: the one asked for is found by arithmetic
        first, second = CLASSES.index("skis") - 1, CLASSES.index("airplane") - 1
        pair = first * 78 + second - (second > first)
        tints = COLORS.index("green") * 9 + COLORS.index("brown") - 1
        assert make(pair * 90 + tints) == record
    else:
        assert record in [make(index) for index in range(size)]


@pytest.mark.parametrize("task", [task for task, (size, _) in TASKS.items() if size < 100_000])
def test_every_index_is_another_prompt(task):
    size, make = TASKS[task]
    assert len({make(index)["prompt"] for index in range(size)}) == size


def test_coloured_persons_are_never_asked_for():
    prompts = load(count=3000, ratios={"colors": 1, "color_attr": 1})
    assert all(clause["class"] != "person" for p in prompts for clause in p.metadata["include"])


def test_generated_records_pass_the_reader():
    for prompt in load(count=120, ratios=EVEN):
        assert parse(json.dumps(prompt.metadata), "generated") == prompt.metadata


def test_the_list_is_a_pure_function_of_its_seed():
    assert load(count=200) == load(count=200)
    assert load(count=200) != load(count=200, seed=1)
    assert [prompt.text for prompt in load(count=17)][:3] == [
        "a photo of a zebra below a cat",
        "a photo of a hair drier right of a sandwich",
        "a photo of a bowl right of a bicycle",
    ]


def test_the_ratios_hold_exactly_where_they_divide():
    counts = Counter(prompt.task for prompt in load(count=1700))
    assert counts == {"position": 700, "counting": 500, "color_attr": 300, "colors": 100, "two_object": 100}


@pytest.mark.parametrize("count", [1, 7, 100, 999])
def test_shares_add_up_and_stay_within_one_of_the_ratio(count):
    ratios = {"a": 7, "b": 5, "c": 3, "d": 0}
    parts = shares(count, ratios)
    assert sum(parts.values()) == count and parts["d"] == 0
    assert all(abs(parts[name] - count * ratio / 15) < 1 for name, ratio in ratios.items())


def test_no_prompt_repeats_before_its_task_is_exhausted():
    uses = Counter(prompt.text for prompt in load(count=1000, ratios={"counting": 1}))
    assert max(uses.values()) - min(uses.values()) <= 1


def test_splits_share_no_scene_whatever_the_seeds():
    train = {scene(p.metadata) for p in load(count=20_000, ratios=EVEN, seed=3)}
    held_out = load(count=3000, ratios=EVEN, seed=4, split="held_out")
    assert not train & {scene(p.metadata) for p in held_out}
    assert {prompt.task for prompt in held_out} == set(TASKS)


def test_excluded_scenes_never_occur_in_either_word_order(tmp_path):
    banned = load(count=300, ratios={"two_object": 1, "position": 1, "counting": 1}, split="all")
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(json.dumps(prompt.metadata) for prompt in banned))
    kept = load(count=20_000, ratios={"two_object": 1, "position": 1, "counting": 1}, split="all", exclude=str(path))
    assert not {scene(p.metadata) for p in banned} & {scene(p.metadata) for p in kept}
    assert len(kept) == 20_000


def test_scenes_do_not_depend_on_word_order():
    def place(first, relation, second):
        include = [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]
        return scene({"include": include})

    def both(first, second):
        return scene({"include": [{"class": first, "count": 1}, {"class": second, "count": 1}]})

    assert both("cat", "dog") == both("dog", "cat")
    assert place("cat", "left of", "dog") == place("dog", "right of", "cat") != place("dog", "left of", "cat")
    assert place("cat", "above", "dog") == place("dog", "below", "cat") != both("cat", "dog")
