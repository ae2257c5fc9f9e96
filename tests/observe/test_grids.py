import numpy as np
import pytest
from PIL import Image

from align_cluster.observe.grids import GAP, LINE, MARGIN, save_grid


def numbered(count: int, size: int = 48) -> np.ndarray:
    """Images of one grey level each."""
    levels = (np.arange(count, dtype=np.uint8) * 7 + 3).reshape(-1, 1, 1, 1)
    return np.broadcast_to(levels, (count, size, size, 3)).copy()


def test_tiny_images_are_enlarged_by_a_whole_factor(tmp_path):
    save_grid(numbered(8), 4, tmp_path / "g.png")
    side = 3 * 48  # the smallest whole factor that reaches 128
    assert Image.open(tmp_path / "g.png").size == (
        2 * MARGIN + 4 * side + 3 * GAP,
        2 * MARGIN + 2 * side + GAP,
    )


def test_pixels_are_repeated_not_blurred(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    save_grid(images, 2, tmp_path / "g.png", min_px=96)
    drawn = np.asarray(Image.open(tmp_path / "g.png"))
    second = drawn[MARGIN : MARGIN + 96, MARGIN + 96 + GAP : MARGIN + 2 * 96 + GAP]
    assert np.array_equal(second, images[1].repeat(2, 0).repeat(2, 1))


def test_large_images_keep_their_size_and_rows_run_left_to_right(tmp_path):
    images = numbered(6, 200)
    save_grid(images, 3, tmp_path / "g.png", ["first row", "second row"])
    picture = np.asarray(Image.open(tmp_path / "g.png"))
    assert picture.shape == (2 * MARGIN + 2 * 200 + MARGIN + 2 * (LINE + 2), 2 * MARGIN + 3 * 200 + 2 * GAP, 3)
    centres = picture[MARGIN + LINE + 2 + 100, [MARGIN + 100, MARGIN + 306, MARGIN + 512], 0]
    assert centres.tolist() == images[:3, 0, 0, 0].tolist()


def test_captions_are_legible_and_long_ones_wrap_to_two_lines(tmp_path):
    save_grid(numbered(2), 2, tmp_path / "short.png", ["a red circle"])
    save_grid(numbered(2), 2, tmp_path / "long.png", ["a red circle beside a green star " * 20])
    short, long = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("short", "long"))
    assert long.shape[0] - short.shape[0] == LINE
    ink = short[MARGIN : MARGIN + LINE, MARGIN:, 0] < 128
    assert ink.sum() > 150 and np.ptp(np.where(ink)[0]) >= 10
    assert (long[:, -MARGIN:] == 255).all()  # nothing runs out of the picture


def test_images_that_make_no_grid_and_a_wrong_number_of_captions_are_refused(tmp_path):
    for shape, columns in [((5, 48, 48, 3), 2), ((4, 48, 48, 4), 2), ((0, 48, 48, 3), 1)]:
        with pytest.raises(ValueError, match="grid of"):
            save_grid(np.zeros(shape, np.uint8), columns, tmp_path / "g.png")
    with pytest.raises(ValueError, match="2 captions"):
        save_grid(numbered(4), 2, tmp_path / "g.png", ["one"])
    assert not list(tmp_path.iterdir())


def test_the_old_grid_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "g.png"
    save_grid(numbered(2), 2, path)
    before = path.read_bytes()

    def torn(self, file, **_):
        file.write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        save_grid(numbered(4), 2, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
