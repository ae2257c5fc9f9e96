from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from align_cluster.rewards.jpeg import Jpeg
from align_cluster.types import Prompt


@pytest.fixture(scope="module")
def images():
    """Grey, a smooth slope, and noise: uint8 [3, 64, 80, 3]."""
    grey, noise = np.full((64, 80, 3), 128), np.random.default_rng(0).integers(0, 256, (64, 80, 3))
    slope = np.broadcast_to(np.linspace(0, 255, 80)[None, :, None], (64, 80, 3))
    return np.stack([grey, slope, noise]).astype(np.uint8)


def scored(images, **settings):
    reward = Jpeg(Jpeg.Config(**settings))
    reward.load("cpu", 1)
    return reward.score(images, [Prompt(i, "a cat") for i in range(len(images))])


def test_is_minus_the_size_of_the_file_in_thousands_of_bytes(images, tmp_path):
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg", quality=95)
    expected = [-(tmp_path / f"{i}.jpg").stat().st_size / 1000 for i in range(3)]
    result = scored(images)
    assert result.values.tolist() == expected
    assert result.valid.all() and result.values.dtype == np.float64
    coarse = BytesIO()
    Image.fromarray(images[2]).save(coarse, "JPEG")
    assert -expected[2] > 1.5 * coarse.tell() / 1000  # another quality would show


def test_smooth_images_are_worth_more_and_less_when_incompressible(images):
    values = scored(images).values
    assert values[0] > values[1] > values[2]
    assert scored(images, incompressible=True).values.tolist() == (-values).tolist()
