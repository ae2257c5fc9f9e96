import numpy as np
import pytest
import torch
from PIL import Image

from align_cluster.rewards.heads import cropped, linear_head, stretched

SHAPES = [(56, 56), (80, 97), (97, 64), (20, 9), (57, 200), (120, 59)]


def picture(height, width):
    """A smooth picture, uint8 [H, W, 3]."""
    rows, columns = np.mgrid[0:height, 0:width] / 20
    image = np.stack([np.sin(rows) + np.cos(columns), np.sin(columns), np.cos(rows * columns)], -1) * 70 + 128
    return image.clip(0, 255).astype(np.uint8)


def floats(image):
    return torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_images_are_stretched_by_pils_bicubic(height, width):
    image = picture(height, width)
    image[height // 4 : height // 2, width // 3 : width // 2] = (255, 0, 255)  # edges, where bicubic overshoots
    mine = stretched(floats(image), 56, 40)[0].permute(1, 2, 0)
    rows = Image.fromarray(image).resize((40, height), Image.Resampling.BICUBIC)
    official = np.asarray(rows.resize((40, 56), Image.Resampling.BICUBIC))
    assert np.abs(mine.numpy() * 255 - official).max() < 1.3  # PIL rounds to 8 bits after each of its two passes


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_images_are_cropped_as_by_the_official_calls_of_torchvision(height, width):
    transforms = pytest.importorskip("torchvision.transforms")

    image = picture(height, width)
    official = transforms.Compose(
        [transforms.Resize(56, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(56)]
    )
    mine = cropped(floats(image), 56)[0].permute(1, 2, 0).numpy()
    assert np.abs(mine * 255 - np.asarray(official(Image.fromarray(image)))).max() < 1.3


def test_an_odd_margin_is_split_as_torchvision_splits_it():
    columns = torch.arange(11.0).div(20).expand(1, 1, 4, 11)
    assert (cropped(columns, 4)[0, 0, 0] * 20).tolist() == pytest.approx([4, 5, 6, 7])  # 3.5 rounds to even
    assert (cropped(columns[..., :9], 4)[0, 0, 0] * 20).tolist() == pytest.approx([2, 3, 4, 5])  # so does 2.5


def test_a_head_is_one_linear_map():
    torch.manual_seed(0)
    head = linear_head(8, (0, 2, 4, 6, 7))
    assert [tuple(layer.weight.shape) for layer in head] == [(1024, 8), (128, 1024), (64, 128), (16, 64), (1, 16)]
    x, y = torch.randn(2, 8)
    torch.testing.assert_close(head(x + y) - head(x), head(y) - head(torch.zeros(8)), rtol=0, atol=1e-5)


def test_a_head_with_activations_between_its_layers_does_not_fit():
    relu = torch.nn.Sequential(
        torch.nn.Linear(8, 1024), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(1024, 128)
    )
    with pytest.raises(RuntimeError):
        linear_head(8, (0, 2, 4, 6, 7)).load_state_dict(relu.state_dict())
