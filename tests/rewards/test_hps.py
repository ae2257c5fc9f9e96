import json

import numpy as np
import pytest
import torch
from PIL import Image

from align_cluster.rewards.hps import Hps, squared

from .helpers import batched, cosine, open_clip_architecture, prompts, refusal

open_clip = pytest.importorskip("open_clip", reason="the extra 'rewards' is not installed")

TEXTS = ["a photo of a red circle", "A drawing of four stars, on a dark background", "a ring"]
LONG = "a very " + "red and green " * 40 + "circle"
SIDE = 56
ARCHITECTURE = open_clip_architecture(SIDE)


def write(folder):
    """Two tiny random checkpoints in the official layout and precision, by the official names; and a model config."""
    (folder / "tiny.json").write_text(json.dumps(ARCHITECTURE))
    for seed, name in enumerate(("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**ARCHITECTURE)
        torch.nn.init.normal_(model.visual.conv1.weight, std=0.05)
        torch.save({"state_dict": model.half().state_dict()}, folder / name)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hps"))


def loaded(folder, **settings):
    reward = Hps(Hps.Config(**{"path": str(folder), "model": str(folder / "tiny.json"), **settings}))
    reward.load("cpu", 1)
    return reward


@pytest.fixture(scope="module")
def reward(folder):
    return loaded(folder)


def boxed(image, side):
    """The official preprocessing of one image uint8 [H, W, 3] up to normalisation, by PIL and numpy: fp32 [S, S, 3]."""
    height, width = image.shape[:2]
    height, width = round(height * side / max(height, width)), round(width * side / max(height, width))
    canvas = np.zeros((side, side, 3), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    for channel in range(3):
        plane = Image.fromarray(image[:, :, channel].astype(np.float32) / 255)  # mode F: no rounding, no clamping
        small = plane.resize((width, height), Image.Resampling.BICUBIC)
        canvas[top : top + height, left : left + width, channel] = np.asarray(small)
    return canvas


def by_hand(path, image, tokens):
    """One score, by plain calls of a model that open_clip itself has loaded."""
    open_clip.add_model_config(path.parent / "tiny.json")
    model = open_clip.create_model("tiny", pretrained=str(path)).eval()
    with torch.no_grad():
        return cosine(model.visual(batched(boxed(image, SIDE)))[0], model.encode_text(tokens)[0])


@pytest.mark.parametrize("version", ["v2", "v2.1"])
def test_equals_an_independent_computation(folder, images, version):
    checkpoint = folder / {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}[version]
    tokens = open_clip.get_tokenizer("ViT-H-14")(TEXTS)
    expected = [by_hand(checkpoint, image, tokens[i : i + 1]) for i, image in enumerate(images)]
    result = loaded(folder, version=version).score(images, prompts(TEXTS))
    np.testing.assert_allclose(result.values, expected, atol=1e-5)
    assert result.valid.all() and result.values.dtype == np.float64 and (np.abs(result.values) <= 1).all()
    assert np.ptp(expected) > 1e-2


@pytest.mark.parametrize(
    ("height", "width"),
    [(SIDE, SIDE), (20, 20), (64, 64), (80, 97), (97, 80), (200, 30), (9, 20), (30, SIDE), (SIDE, 31), (57, 112)],
)
def test_images_of_any_shape_are_scaled_to_the_longer_side_and_padded_black(height, width):
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mine = squared(torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None], SIDE)
    np.testing.assert_allclose(mine[0].permute(1, 2, 0), boxed(image, SIDE), atol=1e-5)


def test_an_odd_row_of_padding_goes_below_and_a_half_pixel_rounds_to_even():
    white = squared(torch.ones(1, 1, 4, 8), 9)[0, 0]  # 4 * 9/8 = 4.5 rows
    assert white.sum(1).tolist() == pytest.approx([0, 0, 9, 9, 9, 9, 0, 0, 0])


@pytest.mark.parametrize(("height", "width"), [(80, 97), (97, 64), (20, 9), (SIDE, SIDE)])
def test_images_are_prepared_as_by_the_official_calls_of_torchvision(height, width):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as V

    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    new = [round(length * SIDE / float(max(height, width))) for length in (height, width)]
    down, right = SIDE - new[0], SIDE - new[1]
    expected = V.pad(
        V.resize(image, new, InterpolationMode.BICUBIC), [right // 2, down // 2, right - right // 2, down - down // 2]
    )
    torch.testing.assert_close(squared(image[None], SIDE)[0], expected, rtol=0, atol=1e-6)


def test_prompts_are_cut_after_77_tokens(folder, reward, images):
    tokenizer = open_clip.SimpleTokenizer()
    words = tokenizer.encode(LONG)
    assert len(words) > 80
    tokens = torch.tensor([[tokenizer.sot_token_id, *words[:75], tokenizer.eot_token_id]])
    value = reward.score(images[:1], prompts([LONG])).values[0]
    assert value == pytest.approx(by_hand(folder / "HPS_v2.1_compressed.pt", images[0], tokens), abs=1e-5)
    assert value == reward.score(images[:1], prompts([LONG + " and a square"])).values[0]


def test_a_checkpoint_file_is_a_path_too(folder, reward, images):
    other = loaded(folder, path=str(folder / "HPS_v2.1_compressed.pt"))
    same = other.score(images, prompts(TEXTS)).values
    np.testing.assert_array_equal(same, reward.score(images, prompts(TEXTS)).values)


def test_a_hub_id_is_read_from_the_hubs_cache(folder, reward, images, hub):
    hub("xswu/HPSv2", folder / "HPS_v2.1_compressed.pt")
    same = loaded(folder, path="xswu/HPSv2").score(images, prompts(TEXTS)).values
    np.testing.assert_array_equal(same, reward.score(images, prompts(TEXTS)).values)


def test_the_default_is_the_published_v2_1():
    config = Hps.Config()
    assert (config.path, config.version, config.model) == ("xswu/HPSv2", "v2.1", "ViT-H-14")
    published = open_clip.get_model_config(config.model)
    assert (published["embed_dim"], published["vision_cfg"]["image_size"]) == (1024, 224)


def test_missing_weights_are_one_sentence(folder, tmp_path):
    for path in (tmp_path, "nobody/nothing", tmp_path / "no" / "such.pt"):
        refusal("hps cannot load .*give a hub id .*HPS_v2.1_compressed.pt", loaded, folder, path=str(path))


def test_what_is_no_checkpoint_or_another_architectures_is_one_sentence(folder, tmp_path):
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    torch.save({"state_dict": {"visual.proj": torch.zeros(2, 2)}}, tmp_path / "small.pt")
    for path in tmp_path.iterdir():
        refusal("hps cannot load", loaded, folder, path=str(path))
    refusal("open_clip has no architecture 'ViT-H-15'", loaded, folder, model="ViT-H-15")
