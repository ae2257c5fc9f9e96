import sys

import numpy as np
import pytest
import torch
from PIL import Image

from align_cluster.embedded.detector import Detection
from align_cluster.rewards.colors import BATCH, ColorNamer, cutout

from .helpers import refusal

open_clip = pytest.importorskip("open_clip", reason="the extra 'rewards' is not installed")

SIDE = 28
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
LABELS = ["teddy bear", "cup", "cup"]


@pytest.fixture(scope="module")
def namer(color_clip):
    return ColorNamer(str(color_clip), "cpu")


@pytest.fixture(scope="module")
def crops():
    """More than CLIP sees at a time, of many sizes."""
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in rng.integers(1, 60, (BATCH + 3, 2))]
    coarse = rng.integers(0, 256, (len(sizes), 3, 3, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(c).resize((w, h), 0)) for c, (h, w) in zip(coarse, sizes, strict=True)]


def prepared(crop):
    """CLIP's preprocessing by PIL and numpy: the shorter side to SIDE, the middle square, normalised."""
    height, width = crop.shape[:2]
    size = [SIDE * length // min(height, width) for length in (width, height)]
    large = Image.fromarray(crop).resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - SIDE) / 2) for length in size)
    pixels = np.asarray(large.crop((left, top, left + SIDE, top + SIDE))) / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)


def by_hand(model, crop, label):
    """The colour's name, and by how much its cosine leads the next."""
    with torch.no_grad():
        seen = model.encode_image(prepared(crop))[0].double().numpy()
        cosines = []
        for color in COLORS:
            texts = [f"a photo of a {color} {label}", f"a photo of a {color}-colored {label}"]
            texts.append(f"a photo of a {color} object")
            read = [model.encode_text(open_clip.tokenize([text]))[0].double().numpy() for text in texts]
            mean = sum(vector / np.linalg.norm(vector) for vector in read) / 3
            cosines.append(seen @ mean / np.linalg.norm(seen) / np.linalg.norm(mean))
    first, second = np.argsort(cosines)[::-1][:2]
    return COLORS[first], cosines[first] - cosines[second]


def test_names_what_an_independent_computation_names(color_clip, namer, crops):
    model = open_clip.create_model(f"local-dir:{color_clip}").eval()
    labels = [LABELS[i % 3] for i in range(len(crops))]
    expected = [by_hand(model, crop, label) for crop, label in zip(crops, labels, strict=True)]
    clear = [lead > 1e-4 for _, lead in expected]
    named = namer(crops, labels)
    assert sum(clear) > 0.9 * len(crops) and len({name for name, _ in expected}) >= 3
    assert [n for n, ok in zip(named, clear, strict=True) if ok] == [
        name for (name, _), ok in zip(expected, clear, strict=True) if ok
    ]


def test_the_class_of_the_object_is_part_of_the_sentences(namer, crops):
    assert namer(crops, ["teddy bear"] * len(crops)) != namer(crops, ["cup"] * len(crops))


def test_a_batch_is_named_as_its_crops_are_one_by_one(namer, crops):
    labels = [LABELS[i % 3] for i in range(len(crops))]
    assert namer(crops, labels) == [namer([c], [label])[0] for c, label in zip(crops, labels, strict=True)]
    assert namer([], []) == []


def test_the_callers_autocast_changes_nothing(color_clip, crops):
    labels = ["cup"] * len(crops)
    plain = ColorNamer(str(color_clip), "cpu")
    wrapped = ColorNamer(str(color_clip), "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wrapped(crops, labels) == plain(crops, labels)
        torch.testing.assert_close(wrapped.known["cup"], plain.known["cup"], rtol=0, atol=0)


def test_cutouts_are_those_of_pil_and_grey_around_the_mask():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    blank = Image.new("RGB", (40, 30), color="#999")
    for _ in range(50):
        x, y = np.sort(rng.uniform(0, 40, 2)), np.sort(rng.uniform(0, 30, 2))
        box = (float(x[0]), float(y[0]), float(x[1]) + 1.5, float(y[1]) + 1.5)
        box = (box[0], box[1], min(box[2], 40.0), min(box[3], 30.0))
        if min(round(box[2]) - round(box[0]), round(box[3]) - round(box[1])) < 1:
            continue
        mask = rng.random((30, 40)) < 0.5
        masked = Image.composite(Image.fromarray(image), blank, Image.fromarray(mask))
        whole = cutout(image, Detection("cup", 1, box, None))
        np.testing.assert_array_equal(whole, np.asarray(Image.fromarray(image).crop(box)))
        np.testing.assert_array_equal(cutout(image, Detection("cup", 1, box, mask)), np.asarray(masked.crop(box)))


@pytest.mark.parametrize("box", [(3.1, 4.2, 3.3, 4.4), (39.8, 29.9, 40, 30), (0, 0, 0.2, 30), (-5, -5, -1, -1)])
def test_a_cutout_is_never_empty(box):
    assert cutout(np.zeros((30, 40, 3), np.uint8), Detection("cup", 1, box, None)).size > 0


def test_what_cannot_be_loaded_is_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "nothing", None):
        refusal("color_clip", ColorNamer, path and str(path), "cpu")


def test_the_missing_package_is_named(color_clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    refusal(r"open_clip.*align-cluster\[rewards\]", ColorNamer, str(color_clip), "cpu")
