import json

import numpy as np
import pytest
import torch
from PIL import Image

from align_cluster.errors import UserError
from align_cluster.prompts.images import ImagePrompts, left_out, read_image, rgb, survey


@pytest.fixture
def folder(tmp_path):
    """Three good images (two captions beside, one in metadata.jsonl), one without a caption, two that cannot be read,
    and one that is named and not there."""
    for index, name in enumerate(("a.png", "b.jpg", "c.webp", "bare.png")):
        Image.new("RGB", (20 + index, 10), (40 * index, 100, 200)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a cat\n on a mat ")
    (tmp_path / "b.txt").write_text("a dog")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:6000])
    (tmp_path / "cut.txt").write_text("half a cat")
    (tmp_path / "notes.md").write_text("no image")
    rows = [{"file_name": "c.webp", "text": "a fish"}, {"file_name": "gone.png", "text": "a ghost"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    survey.cache_clear()
    return tmp_path


def load(folder):
    return ImagePrompts(ImagePrompts.Config(folder=str(folder))).load()


def test_captions_are_prompts_that_know_their_image(folder):
    found = {prompt.text: prompt.metadata["image"] for prompt in load(folder)}
    assert found == {
        "a cat on a mat": str(folder / "a.png"),
        "a dog": str(folder / "b.jpg"),
        "a fish": str(folder / "c.webp"),
    }


def test_what_is_left_out_is_counted_and_named(folder):
    assert left_out(str(folder)) == (
        f"{folder}: of 6 images are left out 1 without a caption, such as bare.png and 2 that cannot be read, "
        "such as cut.png"
    )


def test_a_folder_without_gaps_has_nothing_to_say(folder):
    for name in ("bare.png", "cut.png", "metadata.jsonl", "c.webp"):
        (folder / name).unlink()
    assert left_out(str(folder)) is None and len(load(folder)) == 2


def test_a_folder_in_which_nothing_can_be_used_is_refused(folder):
    for name in ("a.txt", "b.txt", "metadata.jsonl"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="4 have no caption and 1 cannot be read"):
        load(folder)


@pytest.mark.parametrize(
    "line",
    [
        *("nothing", '{"text": "a cat"}', '["a.png", "a cat"]', "[" * 9000, '{"file_name": "a.png", "text": null}'),
        *(
            '{"file_name": 5, "text": "a"}',
            '{"file_name": "", "text": "a"}',
            '{"file_name": "a.png", "file_name": "b"}',
        ),
    ],
)
def test_a_line_of_captions_that_is_none_says_where(folder, line):
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "c.webp", "text": "a fish"}}\n{line}\n')
    with pytest.raises(UserError, match=r"metadata.jsonl, line 2: write one object a line, such as"):
        load(folder)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"file_name": "../a.png", "text": "a cat"}, "leads out of the folder"),
        ({"file_name": "x/../../a.png", "text": "a cat"}, "leads out of the folder"),
        ({"file_name": "/etc/a.png", "text": "a cat"}, "leads out of the folder"),
        ({"file_name": "c.webp", "text": "a shark"}, "has a caption above already"),
        ({"file_name": "./c.webp", "text": "a shark"}, "has a caption above already"),
        ({"file_name": "a\0.png", "text": "a cat"}, "holds a NUL"),
        ({"file_name": "a.png", "text": "a\0cat"}, "holds a NUL"),
    ],
)
def test_a_line_of_captions_that_names_no_file_of_its_own_is_refused(folder, row, said):
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps(row))
    with pytest.raises(UserError, match=f"metadata.jsonl, line 3: .*{said}"):
        load(folder)


def test_captions_that_are_no_utf8_are_refused_and_not_altered(folder):
    (folder / "a.txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(UserError, match="the caption .*a.txt.* must be UTF-8"):
        load(folder)
    (folder / "metadata.jsonl").write_bytes('{"file_name": "c.webp", "text": "a café"}'.encode("latin-1"))
    with pytest.raises(UserError, match="the captions .*metadata.jsonl.* must be UTF-8"):
        load(folder)


@pytest.mark.parametrize("name", ["a.png", "a.txt", "metadata.jsonl"])
def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_followed(folder, tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside") / name
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{name} leads to .*, out of the folder"):
        load(folder)
    (folder / name).unlink()
    outside.rename(folder / "kept")
    (folder / name).symlink_to("kept")
    assert len(load(folder)) == 3


def test_an_image_in_a_folder_below_is_used_where_captions_name_it(folder):
    (folder / "below").mkdir()
    (folder / "c.webp").rename(folder / "below" / "c.webp")
    (folder / "metadata.jsonl").write_text('{"file_name": "below/c.webp", "text": "a fish"}')
    assert load(folder)[-1].metadata["image"] == str(folder / "below" / "c.webp")


def test_images_in_folders_below_are_used_with_captions_beside_and_counted_without(folder):
    """They were counted nowhere unless metadata.jsonl named them."""
    (folder / "below" / "deeper").mkdir(parents=True)
    for name in ("below/d.png", "below/deeper/e.png", "below/deeper/bare.png", "below/.hidden.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "below" / "d.txt").write_text("a bird")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "below/deeper/e.png", "text": "a fly"}')
    (folder / "bare.png").unlink()
    found = {prompt.text: prompt.metadata["image"] for prompt in load(folder)}
    assert found["a bird"] == str(folder / "below/d.png") and found["a fly"] == str(folder / "below/deeper/e.png")
    assert "of 8 images are left out 1 without a caption, such as below/deeper/bare.png and 2" in left_out(str(folder))


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="which is no folder here"):
        load(tmp_path / "nothing")


def test_grey_values_of_16_bits_are_scaled_and_not_cut(tmp_path):
    """65,535 is white, so 257 k is the k of 8 bits; Pillow's own conversion makes everything from 255 on white."""
    steps = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(257 * steps).save(tmp_path / "deep.png")
    Image.fromarray(steps.astype(np.uint8)).save(tmp_path / "plain.png")
    assert Image.open(tmp_path / "deep.png").mode == "I;16"
    deep, plain = (read_image(str(tmp_path / name), 16, 16) for name in ("deep.png", "plain.png"))
    assert torch.equal(deep, plain) and deep[0, 0, 0] == 0 and deep[2, 15, 15] == 1
    between = np.array([[0, 128, 129, 32_768, 65_406, 65_407]], np.uint16)
    assert np.asarray(rgb(Image.fromarray(between)))[0, :, 1].tolist() == [0, 0, 1, 128, 254, 255]


def test_grey_values_without_a_known_white_are_not_guessed(folder):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(folder / "float.tiff")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "float.tiff", "text": "a cloud"}')
    assert "3 that cannot be read" in left_out(str(folder)) and "a cloud" not in [one.text for one in load(folder)]


def test_an_image_covers_the_size_that_is_asked_for_and_keeps_its_middle(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 30:50] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found = read_image(str(tmp_path / "wide.png"), 20, 20)
    assert found.shape == (3, 20, 20) and found.dtype == torch.float32
    assert found[:, :, 8:12].min() > 0.95 and found[:, :, :4].max() < 0.05
