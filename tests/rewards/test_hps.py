import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from align_cluster.config.check import judges
from align_cluster.rewards import REWARDS
from align_cluster.rewards.hps import Hps, squared
from align_cluster.rewards.worker import RewardWorker
from align_cluster.types import Prompt, UserError

open_clip = pytest.importorskip("open_clip", reason="the extra 'rewards' is not installed")

TEXTS = ["a photo of a red circle", "A drawing of four stars, on a dark background", "a ring"]
LONG = "a very " + "red and green " * 40 + "circle"
SIDE = 56
# ViT-H-14 in small: the same family, patch size, vocabulary and text length.
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny random checkpoints in the official layout and precision, by the official names; and a model config."""
    folder = tmp_path_factory.mktemp("hps")
    (folder / "tiny.json").write_text(json.dumps(ARCHITECTURE))
    for seed, name in enumerate(("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**ARCHITECTURE)
        torch.nn.init.normal_(model.visual.conv1.weight, std=0.05)
        torch.save({"state_dict": model.half().state_dict()}, folder / name)
    return folder


def loaded(folder, **settings):
    reward = Hps(Hps.Config(**{"path": str(folder), "model": str(folder / "tiny.json"), **settings}))
    reward.load("cpu", 1)
    return reward


@pytest.fixture(scope="module")
def reward(folder):
    return loaded(folder)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 80, 97, 3), dtype=np.uint8)


def prompts(texts):
    return [Prompt(i, text) for i, text in enumerate(texts)]


def framed(image, side):
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
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor((framed(image, SIDE) - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        seen, read = model.visual(pixels)[0].double().numpy(), model.encode_text(tokens)[0].double().numpy()
    return seen @ read / np.linalg.norm(seen) / np.linalg.norm(read)


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
    np.testing.assert_allclose(mine[0].permute(1, 2, 0), framed(image, SIDE), atol=1e-5)


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


def test_a_batch_scores_as_its_images_do_one_by_one(reward, images):
    batch = reward.score(images, prompts(TEXTS)).values
    singles = [reward.score(images[i : i + 1], prompts(TEXTS[i : i + 1])).values[0] for i in range(3)]
    np.testing.assert_allclose(batch, singles, atol=1e-5)


def test_the_same_image_twice_scores_the_same(reward, images):
    first, second = reward.score(images[[0, 0]], prompts([TEXTS[0]] * 2)).values
    assert first == pytest.approx(second, abs=1e-6)


def test_every_image_meets_its_own_prompt(reward, images):
    crossed = reward.score(images[[0, 1, 0]], prompts([TEXTS[1], TEXTS[0], TEXTS[0]])).values
    straight = reward.score(images[:2], prompts(TEXTS[:2])).values
    assert crossed[2] == pytest.approx(straight[0], abs=1e-6)
    assert abs(crossed[0] - straight[1]) > 1e-3


def test_prompts_are_cut_after_77_tokens(folder, reward, images):
    tokenizer = open_clip.SimpleTokenizer()
    words = tokenizer.encode(LONG)
    assert len(words) > 80
    tokens = torch.tensor([[tokenizer.sot_token_id, *words[:75], tokenizer.eot_token_id]])
    value = reward.score(images[:1], prompts([LONG])).values[0]
    assert value == pytest.approx(by_hand(folder / "HPS_v2.1_compressed.pt", images[0], tokens), abs=1e-5)
    assert value == reward.score(images[:1], prompts([LONG + " and a square"])).values[0]


def floats(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def test_the_differentiable_score_is_the_score(reward, images):
    values = reward.differentiable(floats(images).requires_grad_(), prompts(TEXTS))
    assert values.shape == (3,) and values.dtype == torch.float32
    np.testing.assert_allclose(values.detach(), reward.score(images, prompts(TEXTS)).values, atol=1e-5)


def test_the_gradient_to_the_pixels_is_that_of_finite_differences(reward, images):
    pixels = floats(images).requires_grad_()
    reward.differentiable(pixels, prompts(TEXTS)).sum().backward()
    assert all(parameter.grad is None for parameter in reward.model.parameters())
    assert (pixels.grad.flatten(1).norm(dim=1) > 0).all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        step = 3e-3 * torch.randn(pixels.shape, generator=generator)
        with torch.no_grad():
            ahead, behind = (reward.differentiable(pixels + sign * step, prompts(TEXTS)) for sign in (1, -1))
        slopes = (pixels.grad * step).flatten(1).sum(1)
        torch.testing.assert_close((ahead - behind) / 2, slopes, rtol=0, atol=0.02 * slopes.abs().max().item())


def test_the_callers_autocast_changes_nothing(reward, images):
    plain = reward.differentiable(floats(images), prompts(TEXTS))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(reward.differentiable(floats(images), prompts(TEXTS)), plain, rtol=0, atol=1e-6)


def test_a_checkpoint_file_is_a_path_too(folder, reward, images):
    other = loaded(folder, path=str(folder / "HPS_v2.1_compressed.pt"))
    same = other.score(images, prompts(TEXTS)).values
    np.testing.assert_array_equal(same, reward.score(images, prompts(TEXTS)).values)


def test_a_hub_id_is_read_from_the_hubs_cache(folder, reward, images, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "models--xswu--HPSv2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "HPS_v2.1_compressed.pt").symlink_to(folder / "HPS_v2.1_compressed.pt")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    same = loaded(folder, path="xswu/HPSv2").score(images, prompts(TEXTS)).values
    np.testing.assert_array_equal(same, reward.score(images, prompts(TEXTS)).values)


def test_the_default_is_the_published_v2_1():
    config = Hps.Config()
    assert (config.path, config.version, config.model) == ("xswu/HPSv2", "v2.1", "ViT-H-14")
    published = open_clip.get_model_config(config.model)
    assert (published["embed_dim"], published["vision_cfg"]["image_size"]) == (1024, 224)


def test_a_run_can_ask_for_it_and_any_prompt_will_do(folder, images):
    config = REWARDS["hps"].Config(path=str(folder), model=str(folder / "tiny.json"))
    scores = RewardWorker({"preference": config}).score(images, prompts(TEXTS))
    assert scores.failures == {} and scores.valid["preference"].all()
    assert judges("hps", Prompt(0, "a cat"))


def test_missing_weights_are_one_sentence(folder, tmp_path):
    for settings in ({"path": str(tmp_path)}, {"path": "nobody/nothing"}, {"path": str(tmp_path / "no" / "such.pt")}):
        with pytest.raises(UserError, match="hps cannot load .*give a hub id .*HPS_v2.1_compressed.pt") as caught:
            loaded(folder, **settings)
        assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_or_another_architectures_is_one_sentence(folder, tmp_path):
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    torch.save({"state_dict": {"visual.proj": torch.zeros(2, 2)}}, tmp_path / "small.pt")
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match="hps cannot load") as caught:
            loaded(folder, path=str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="open_clip has no architecture 'ViT-H-15'"):
        loaded(folder, model="ViT-H-15")


def test_a_missing_open_clip_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install 'align-cluster\[rewards\]'"):
        Hps(Hps.Config()).load("cpu", 1)
