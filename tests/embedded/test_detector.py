import random

import numpy as np
import pytest
import torch

from align_cluster.embedded import scene
from align_cluster.embedded.detector import COLORS, detect
from align_cluster.embedded.render import SIZE, coverage, render

THRESHOLD = 0.80
TASKS = [task for task in scene.TASKS if task != "ocr"]


def drawn(records, seed=5):
    return render(list(records), seed).permute(0, 2, 3, 1).numpy()


def canvas(*pieces, ground=150):
    """An image with (mask in [0, 1], color name) pieces painted over grey."""
    image = torch.full((SIZE, SIZE, 3), float(ground))
    for mask, color in pieces:
        image = image * (1 - mask[..., None]) + mask[..., None] * torch.tensor(scene.COLORS[color]).float()
    return image.round().to(torch.uint8).numpy()[None]


def disc(cx, cy, radius, shape="circle"):
    return coverage(shape, *(torch.tensor([float(value)]) for value in (cx, cy, radius)))[0]


def satisfied(record, detections):
    """Exactly the asked objects are there, in the asked colors."""
    sure = [d for d in detections if d.score > THRESHOLD]
    if len(sure) != sum(clause["count"] for clause in record["include"]):
        return False
    for clause in record["include"]:
        same = [d for d in sure if d.label == clause["class"]]
        if len(same) != clause["count"] or any(d.color != clause.get("color", d.color) for d in same):
            return False
    return True


@pytest.mark.parametrize("task", TASKS)
def test_finds_what_was_rendered_and_nothing_else(task):
    records = scene.prompts(task, "held_out")[:250]
    right = [satisfied(record, found) for record, found in zip(records, detect(drawn(records)), strict=True)]
    assert np.mean(right) >= 0.98


def test_images_do_not_satisfy_each_others_prompts():
    records = [record for task in TASKS for record in scene.prompts(task, "held_out")[:60]]
    found = detect(drawn(records))
    others = random.Random(1).sample(records, len(records))
    assert np.mean([satisfied(record, objects) for record, objects in zip(others, found, strict=True)]) < 0.05


def test_box_mask_and_color_are_those_of_the_drawn_object():
    for record in scene.prompts("colors", "held_out")[:20]:
        (detection,) = detect(drawn([record], seed=3))[0]
        ((shape, color, x, y, radius),) = scene.layout(record, random.Random(3))
        truth = (disc(x, y, radius, shape) > 0.5).numpy()
        ys, xs = np.where(truth)
        assert (detection.label, detection.color) == (shape, color)
        assert (detection.mask & truth).sum() / (detection.mask | truth).sum() > 0.9
        assert np.abs(np.array(detection.box) - (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)).max() <= 2


def test_a_batch_gives_what_its_images_give_one_by_one():
    images = drawn([scene.prompts(task, "held_out")[7] for task in TASKS])
    together = detect(images)
    for index, found in enumerate(together):
        (alone,) = detect(images[index : index + 1])
        assert [(d.label, d.color, d.score, d.box) for d in found] == [
            (d.label, d.color, d.score, d.box) for d in alone
        ]
        assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)


def test_specks_are_dropped():
    image = canvas((disc(20, 24, 12), "red"))
    image[0, 40:44, 40:44] = scene.COLORS["blue"]
    assert [(d.label, d.color) for d in detect(image)[0]] == [("circle", "red")]


def test_a_colour_fringe_belongs_to_its_blob():
    whole, cut = disc(24, 24, 14), torch.arange(SIZE)[None, :] >= 35
    image = canvas((whole, "orange"), (whole * cut, "yellow"))  # a crescent 3 pixels wide, as a VAE paints it
    assert [(d.label, d.color) for d in detect(image)[0]] == [("circle", "orange")]


def test_a_coloured_ground_is_no_object():
    for color in COLORS:
        assert detect(np.full((1, SIZE, SIZE, 3), scene.COLORS[color], dtype=np.uint8)) == [[]]


def test_something_between_two_shapes_is_surely_neither():
    axis = (torch.arange(SIZE) + 0.5 - 24).abs() / 12
    between = ((axis[:, None] ** 3.3 + axis[None, :] ** 3.3) < 1).float()  # between circle (2) and square (infinity)
    (detection,) = detect(canvas((between, "blue")))[0]
    assert detection.score < THRESHOLD


def test_an_oval_is_surely_no_circle():
    axis = torch.arange(SIZE) + 0.5 - 24
    oval = ((axis[:, None] / 14) ** 2 + (axis[None, :] / 11) ** 2 < 1).float()
    (detection,) = detect(canvas((oval, "green")))[0]
    assert detection.score < THRESHOLD


def test_no_images_and_empty_images_give_no_objects():
    assert detect(np.zeros((0, SIZE, SIZE, 3), dtype=np.uint8)) == []
    assert detect(np.full((2, SIZE, SIZE, 3), 128, dtype=np.uint8)) == [[], []]
