import random
from itertools import combinations

import pytest
import torch

from align_cluster.backbones.sd3 import SD3
from align_cluster.embedded import pipeline_path, scene
from align_cluster.embedded.render import coverage, render
from align_cluster.pretraining.networks import MAX_LENGTH, new_tokenizer


@pytest.mark.parametrize("task", scene.TASKS)
def test_every_task_holds_out_at_least_fifty_prompts_that_training_never_sees(task):
    train, held_out = ({record["prompt"] for record in scene.prompts(task, split)} for split in ("train", "held_out"))
    assert len(held_out) >= 50 and len(train) >= 50
    assert not train & held_out


def test_an_unknown_task_or_split_is_named():
    with pytest.raises(ValueError, match="unknown task 'colour'.*colors"):
        scene.prompts("colour", "train")
    with pytest.raises(ValueError, match="unknown split 'test'"):
        scene.prompts("colors", "test")


@pytest.mark.parametrize("task", [task for task in scene.TASKS if task != "ocr"])
def test_a_layout_draws_what_the_record_includes_without_overlap(task):
    rng = random.Random(0)
    for record in scene.prompts(task, "held_out"):
        objects = scene.layout(record, rng)
        wanted = sorted((c["class"], c.get("color")) for c in record["include"] for _ in range(c["count"]))
        drawn = sorted((shape, color) for shape, color, *_ in objects)
        for (shape, color), (shape_drawn, color_drawn) in zip(wanted, drawn, strict=True):
            assert shape == shape_drawn and color in (None, color_drawn)
        for (*_, x, y, radius), (*_, x2, y2, radius2) in combinations(objects, 2):
            assert max(abs(x - x2), abs(y - y2)) > radius + radius2
        assert all(radius <= min(x, y, 48 - x, 48 - y) for *_, x, y, radius in objects)


def test_positions_are_drawn_as_the_relation_says_with_y_down():
    for record in scene.prompts("position", "held_out"):
        (_, _, tx, ty, _), (_, _, x, y, _) = scene.layout(record, random.Random(1))
        relation = record["include"][1]["position"][0]
        assert {"left of": x < tx, "right of": x > tx, "above": y < ty, "below": y > ty}[relation]


def test_images_are_a_pure_function_of_records_and_seed():
    records = [scene.prompts(task, "train")[3] for task in scene.TASKS]
    first = render(records, seed=5)
    assert first.shape == (len(records), 3, 48, 48) and first.dtype == torch.uint8
    assert torch.equal(first, render(records, seed=5))
    assert not torch.equal(first, render(records, seed=6))


@pytest.mark.parametrize(("shape", "area"), [("circle", torch.pi * 0.98**2), ("square", 4 * 0.88**2)])
def test_masks_have_the_area_of_the_shape(shape, area):
    mask = coverage(shape, torch.tensor([24]), torch.tensor([24]), torch.tensor([12]))
    assert mask.sum().item() == pytest.approx(area * 144, rel=0.02)


def test_every_prompt_fits_the_tokenizer_and_has_no_unknown_word():
    tokenizer = new_tokenizer()
    texts = [
        record["prompt"]
        for task in scene.TASKS
        for split in ("train", "held_out")
        for record in scene.prompts(task, split)
    ]
    ids = tokenizer(texts)["input_ids"]
    assert max(map(len, ids)) <= MAX_LENGTH
    assert tokenizer.unk_token_id not in {token for row in ids for token in row}


def test_the_shipped_pipeline_is_small_and_the_stock_pipeline_draws_with_it():
    from diffusers import StableDiffusion3Pipeline

    assert sum(path.stat().st_size for path in pipeline_path().rglob("*") if path.is_file()) <= 10_000_000
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_path(), text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(torch.float32)
    images = pipe(
        ["a photo of a red circle", "a photo of two blue squares"],
        num_inference_steps=4,
        guidance_scale=3.0,
        max_sequence_length=0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert images.shape == (2, 48, 48, 3)
    assert images.std() > 0.05


def test_words_outside_of_the_world_are_named_and_those_of_the_world_are_known():
    backbone = SD3(SD3.Config())
    (note,) = backbone.text_notes(["a cat on a skateboard", "a photo of a Red circle!", "a photo of a red circle"])
    assert note.startswith(
        "2 of 3 prompts have words that the text encoder does not know, and nothing of them is drawn: "
        "'cat', 'skateboard', 'Red', 'circle!'; the embedded model knows circles, squares"
    )
    (note,) = backbone.text_notes(["one five six seven eight nine"])
    assert (
        note.startswith("the prompt has words")
        and "is drawn: 'one', 'five', 'six', 'seven', 'eight' and 1 more; the embedded model" in note
    )
    known = [
        record["prompt"]
        for task in scene.TASKS
        for split in ("train", "held_out")
        for record in scene.prompts(task, split)
    ]
    assert not list(backbone.text_notes(known))
