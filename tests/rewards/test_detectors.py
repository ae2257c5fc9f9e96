import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from align_cluster.embedded import scene
from align_cluster.embedded.detector import detect
from align_cluster.embedded.render import render
from align_cluster.prompts.geneval import CLASSES
from align_cluster.rewards.detectors import BATCH, Boxes, Embedded, Masks, geneval_name, mask_box

from .helpers import refusal

# What COCO's two wordings are called in GenEval's object_names.txt; all other names are the same.
RENAMED = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
HEIGHT, WIDTH = 40, 52
SIZES = {"mask2former": (64, 96), "maskformer": (64, 96), "detr": (64, 83), "conditional_detr": (64, 83)}
SIZES["rt_detr"] = (64, 64)


@pytest.fixture(scope="module")
def images():
    """More than a model sees at a time."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)) for _ in range(BATCH + 1)]
    return np.stack([np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)) for image in coarse])


def loaded(folders, name):
    kind = Masks if "mask" in name else Boxes
    detector = kind(kind.Config(path=str(folders[name])))
    detector.load("cpu")
    return detector


# ---- by hand: PIL and numpy, plain model calls, one image at a time, and one (query, class) pair after the other ----


def said(folder, name, image):
    """What the model says of one image, which is scaled as its published preprocessor says."""
    import transformers

    auto = "AutoModelForUniversalSegmentation" if "mask" in name else "AutoModelForObjectDetection"
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    height, width = SIZES[name]
    pixels = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)) / 255
    if name != "rt_detr":
        pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        return model(pixel_values=torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)), model.config


def strongest_pairs(probabilities, count):
    """The `count` best of [Q, C] as (probability, query, class)."""
    table = [(float(p), q, c) for q, row in enumerate(probabilities) for c, p in enumerate(row)]
    return sorted(table, reverse=True)[:count]


def masks_by_hand(folder, name, image, above):
    output, config = said(folder, name, image)
    found, logits = [], output.class_queries_logits[0]
    for p, query, label in strongest_pairs(logits.softmax(-1)[:, :-1], len(logits)):
        grid = output.masks_queries_logits[0, query][None, None]
        if name == "mask2former":  # its post-processing goes by way of 384 x 384, MaskFormer's does not
            grid = F.interpolate(grid, (384, 384), mode="bilinear", align_corners=False)
        grid = grid[0, 0].numpy()
        inside = grid > 0
        score = p * (1 / (1 + np.exp(-grid[inside].astype(float)))).mean() if inside.any() else 0
        mask = nearest(inside)
        if score > above and mask.any():
            y, x = np.nonzero(mask)
            box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
            found.append((score, geneval_name(config.id2label[label]), box, mask))
    return sorted(found, key=lambda row: -row[0])


def nearest(mask):
    (height, width), y, x = mask.shape, np.arange(HEIGHT), np.arange(WIDTH)
    return mask[y * height // HEIGHT][:, x * width // WIDTH]


def boxes_by_hand(folder, name, image, above):
    output, config = said(folder, name, image)
    logits = output.logits[0]
    if name == "detr":  # one class a query, and the last one says that there is nothing
        best = logits.softmax(-1)[:, :-1].max(-1)
        pairs = [(p, q, c) for q, (p, c) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True))]
    else:
        pairs = strongest_pairs(logits.sigmoid(), 100 if name == "conditional_detr" else len(logits))
    found = []
    for p, query, label in pairs:
        x, y, w, h = (float(v) for v in output.pred_boxes[0, query])
        edges = (x - w / 2) * WIDTH, (y - h / 2) * HEIGHT, (x + w / 2) * WIDTH, (y + h / 2) * HEIGHT
        box = tuple(min(max(e, 0.0), limit) for e, limit in zip(edges, (WIDTH, HEIGHT) * 2, strict=True))
        if p > above and config.id2label[label] != "N/A":
            found.append((p, geneval_name(config.id2label[label]), box, None))
    return sorted(found, key=lambda row: -row[0])


# ---- the tests ----


def test_every_label_of_published_checkpoints_has_its_name_in_geneval(published_labels):
    for labels, gaps in zip(published_labels, (0, 11), strict=True):
        names = [label for label in labels if label != "N/A"]
        assert len(labels) - len(names) == gaps
        assert [geneval_name(name) for name in names] == list(CLASSES)
        assert {name: geneval_name(name) for name in names if geneval_name(name) != name}.items() <= RENAMED.items()


@pytest.mark.parametrize("above", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("name", ["mask2former", "maskformer", "detr", "conditional_detr", "rt_detr"])
def test_finds_what_an_independent_computation_finds(detector_folders, images, name, above):
    by_hand = masks_by_hand if "mask" in name else boxes_by_hand
    found = loaded(detector_folders, name).detect(images[:2], above)
    for image, objects in zip(images, found, strict=False):
        expected = by_hand(detector_folders[name], name, image, above)
        assert [d.label for d in objects] == [label for _, label, _, _ in expected]
        np.testing.assert_allclose([d.score for d in objects], [score for score, _, _, _ in expected], atol=1e-4)
        for detection, (_, _, box, mask) in zip(objects, expected, strict=True):
            np.testing.assert_allclose(detection.box, box, atol=0.01)
            if mask is None:
                assert detection.mask is None
            else:
                assert detection.mask.dtype == bool and (detection.mask == mask).all()


@pytest.mark.parametrize("name", ["mask2former", "rt_detr"])
def test_a_batch_finds_what_its_images_do_one_by_one(detector_folders, images, name):
    detector = loaded(detector_folders, name)
    together = detector.detect(images, 0.3)
    alone = [detector.detect(images[i : i + 1], 0.3)[0] for i in range(len(images))]
    assert len(together) == BATCH + 1 and sum(map(len, together)) > BATCH
    for batch, single in zip(together, alone, strict=True):
        assert [d.label for d in batch] == [d.label for d in single]
        np.testing.assert_allclose([d.score for d in batch], [d.score for d in single], atol=1e-4)
        np.testing.assert_allclose([d.box for d in batch], [d.box for d in single], atol=0.01)


def test_only_what_is_surer_than_asked_is_returned_and_the_surest_first(detector_folders, images):
    detector = loaded(detector_folders, "mask2former")
    for above in (0.2, 0.5):
        scores = [[d.score for d in objects] for objects in detector.detect(images, above)]
        assert min(sum(scores, [])) > above and all(row == sorted(row, reverse=True) for row in scores)
    assert detector.detect(images, 0.999) == [[]] * len(images) and detector.detect(images[:0], 0.3) == []


def test_boxes_end_at_the_images_edge_and_labels_without_a_name_are_dropped(detector_folders):
    detector = loaded(detector_folders, "detr")
    logits = torch.full((1, 3, 92), -20.0)  # 91 labels and "nothing"
    for query, label in enumerate((1, 12, 91)):  # a person, no object of COCO, nothing
        logits[0, query, label] = 20
    boxes = torch.tensor([[[0.9, 0.1, 0.6, 0.5]] * 3])
    (found,) = detector._read(SimpleNamespace(logits=logits, pred_boxes=boxes), (HEIGHT, WIDTH), 0.3)
    assert [d.label for d in found] == ["person", "n/a"]  # detect drops the second
    np.testing.assert_allclose(found[0].box, (0.6 * WIDTH, 0, WIDTH, 0.35 * HEIGHT), atol=1e-4)


def test_a_masks_box_is_tight_and_its_far_edges_are_exclusive():
    mask = np.zeros((6, 9), bool)
    mask[2:4, 5] = mask[3, 5:8] = True
    assert mask_box(mask) == (5, 2, 8, 4)


def test_the_callers_autocast_changes_nothing(detector_folders, images):
    detector = loaded(detector_folders, "mask2former")
    plain = detector.detect(images[:1], 0.2)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wrapped = detector.detect(images[:1], 0.2)[0]
    assert [(d.label, d.score, d.box) for d in plain] == [(d.label, d.score, d.box) for d in wrapped]


def changed(folder, tmp_path, settings=None, weights=None):
    """A copy of a detector's folder with other settings, or without the weights named."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if settings:
        file = copy / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    if weights:
        kept = {name: value for name, value in load_file(copy / "model.safetensors").items() if name != weights}
        save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def refused(kind, path):
    return refusal(f"the detector {kind.Config().kind} cannot load", kind(kind.Config(path=str(path))).load, "cpu")


def test_what_cannot_be_loaded_is_one_sentence(detector_folders, tmp_path):
    assert "preprocessor_config.json" in refused(Masks, tmp_path / "nothing")
    refused(Masks, detector_folders["detr"])
    refused(Boxes, detector_folders["mask2former"])


def test_a_checkpoint_without_its_class_head_is_refused(detector_folders, tmp_path):
    folder = changed(detector_folders["detr"], tmp_path, weights="class_labels_classifier.weight")
    assert "the checkpoint has no class_labels_classifier.weight" in refused(Boxes, folder)


def test_labels_that_lack_an_object_of_geneval_are_refused(detector_folders, tmp_path):
    labels = json.loads((detector_folders["detr"] / "config.json").read_text())["id2label"]
    renamed = {index: "mug" if label == "cup" else label for index, label in labels.items()}
    folder = changed(detector_folders["detr"], tmp_path, {"id2label": renamed})
    assert "its labels have no 'cup'" in refused(Boxes, folder)


def test_the_embedded_detector_is_the_one_of_the_embedded_world():
    records = [scene.prompts(task, "held_out")[0] for task in scene.TASKS]
    pictures = render(records, 1).permute(0, 2, 3, 1).numpy()
    detector = Embedded(Embedded.Config())
    detector.load("cpu")
    found, expected = detector.detect(pictures, 0.8), detect(pictures)
    assert sum(map(len, found)) > 5
    for ours, theirs in zip(found, expected, strict=True):
        assert [(d.label, d.score, d.box, d.color) for d in ours] == [
            (d.label, d.score, d.box, d.color) for d in theirs
        ]
