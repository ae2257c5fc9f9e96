import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from align_cluster.config.check import judges
from align_cluster.rewards import REWARDS
from align_cluster.rewards.open_clip_score import OpenClipScore
from align_cluster.rewards.worker import RewardWorker
from align_cluster.types import Prompt, UserError

open_clip = pytest.importorskip("open_clip", reason="the extra 'rewards' is not installed")

TEXTS = ["a photo of a red circle", "A drawing of four stars, on a dark background", "a ring"]
LONG = "a very " + "red and green " * 40 + "circle"
SIDE = 42
MODEL = {  # DFN's ViT-H-14 in small
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
BYTES = 1.5 / 255 / 0.26  # what PIL's rounding to 8 bits, once a pass, may change in a normalised pixel


def saved(folder, suffix="bin", **preprocessing):
    """A tiny random checkpoint in the layout of open_clip's hub repositories."""
    folder.mkdir(exist_ok=True)
    prepared = {"mean": MEAN, "std": STD, "interpolation": "bicubic", **preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": prepared}))
    torch.manual_seed(0)
    weights = {name: value.contiguous() for name, value in open_clip.CLIP(**MODEL).state_dict().items()}
    if suffix == "bin":
        torch.save(weights, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def loaded(folder):
    reward = OpenClipScore(OpenClipScore.Config(path=str(folder)))
    reward.load("cpu", 1)
    return reward


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("open_clip"), resize_mode="squash")


@pytest.fixture(scope="module")
def reward(folder):
    return loaded(folder)


@pytest.fixture(scope="module")
def images():
    rows, columns = np.mgrid[0:80, 0:97] / 15
    waves = [np.stack([np.sin(rows + k), np.cos(columns * k + 1), np.sin(rows * columns)], -1) for k in range(3)]
    return (np.stack(waves) * 100 + 128).astype(np.uint8)


def prompts(texts):
    return [Prompt(i, text) for i, text in enumerate(texts)]


def floats(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def framed(image, width, height):
    """PIL's bicubic without its rounding to 8 bits: image uint8 [H, W, 3] as floats [height, width, 3] in [0, 1]."""
    planes = []
    for channel in range(3):
        plane = Image.fromarray(image[:, :, channel].astype(np.float32) / 255)  # mode F
        for size in ((width, image.shape[0]), (width, height)):
            plane = Image.fromarray(np.asarray(plane.resize(size, Image.Resampling.BICUBIC)).clip(0, 1))
        planes.append(np.asarray(plane))
    return np.stack(planes, -1)


def by_hand(folder, image, tokens):
    """One cosine by plain calls: squashed by PIL, weights read into an architecture of own making."""
    model = open_clip.CLIP(**MODEL)
    model.load_state_dict(torch.load(folder / "open_clip_pytorch_model.bin"))
    pixels = torch.tensor((framed(image, SIDE, SIDE) - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        seen = model.eval().visual(pixels)[0].double().numpy()
        read = model.encode_text(tokens)[0].double().numpy()
    return seen @ read / np.linalg.norm(seen) / np.linalg.norm(read)


def test_equals_an_independent_computation(folder, reward, images):
    tokens = open_clip.get_tokenizer("ViT-H-14")(TEXTS)
    expected = [by_hand(folder, image, tokens[i : i + 1]) for i, image in enumerate(images)]
    result = reward.score(images, prompts(TEXTS))
    np.testing.assert_allclose(result.values, expected, atol=1e-5)
    assert result.valid.all() and result.values.dtype == np.float64
    assert np.ptp(expected) > 1e-2


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["squash", "shortest"])
@pytest.mark.parametrize(("height", "width"), [(80, 97), (97, 51), (30, 41), (SIDE, SIDE), (84, 84)])
def test_images_are_prepared_by_the_checkpoints_own_transform(tmp_path, mode, interpolation, height, width):
    folder = saved(tmp_path / "a", resize_mode=mode, interpolation=interpolation, mean=[0.3, 0.4, 0.5], std=[0.26] * 3)
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([rows * 2, columns * 2, 128 + 90 * np.sin(rows / 5 + columns / 3)], -1).astype(np.uint8)
    image[:8] = (255, 0, 255)  # an edge, where bicubic overshoots
    official = transform(Image.fromarray(image))
    reward, seen = loaded(folder), []
    reward.model.encode_image = lambda pixels: seen.append(pixels) or torch.ones(len(pixels), 16)
    reward.score(image[None], prompts(TEXTS[:1]))
    assert (seen[0][0] - official).abs().max() < BYTES


def test_a_batch_scores_as_its_images_do_one_by_one(reward, images):
    batch = reward.score(images, prompts(TEXTS)).values
    singles = [reward.score(images[i : i + 1], prompts(TEXTS[i : i + 1])).values[0] for i in range(3)]
    np.testing.assert_allclose(batch, singles, atol=1e-5)


def test_every_image_meets_its_own_prompt(reward, images):
    crossed = reward.score(images[[0, 1, 0]], prompts([TEXTS[1], TEXTS[0], TEXTS[0]])).values
    straight = reward.score(images[:2], prompts(TEXTS[:2])).values
    assert crossed[2] == pytest.approx(straight[0], abs=1e-6)
    assert abs(crossed[0] - straight[1]) > 1e-3


def test_prompts_are_cut_after_77_tokens(folder, reward, images):
    tokenizer = open_clip.SimpleTokenizer()
    tokens = torch.tensor([[tokenizer.sot_token_id, *tokenizer.encode(LONG)[:75], tokenizer.eot_token_id]])
    value = reward.score(images[:1], prompts([LONG])).values[0]
    assert value == pytest.approx(by_hand(folder, images[0], tokens), abs=1e-5)
    assert value == reward.score(images[:1], prompts([LONG + " and a square"])).values[0]


def test_the_differentiable_score_is_the_score(reward, images):
    values = reward.differentiable(floats(images).requires_grad_(), prompts(TEXTS))
    assert values.shape == (3,) and values.dtype == torch.float32
    np.testing.assert_allclose(values.detach(), reward.score(images, prompts(TEXTS)).values, atol=1e-6)


def test_the_gradient_to_the_pixels_is_that_of_finite_differences(reward, images):
    pixels = (0.2 + 0.6 * floats(images)).requires_grad_()  # room for the steps: the preprocessing clamps
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


def test_safetensors_are_read_too(reward, images, tmp_path):
    same = loaded(saved(tmp_path / "a", suffix="safetensors", resize_mode="squash")).score(images, prompts(TEXTS))
    np.testing.assert_array_equal(same.values, reward.score(images, prompts(TEXTS)).values)


def test_a_hub_id_is_read_from_the_hubs_cache(folder, reward, images, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "models--apple--DFN5B-CLIP-ViT-H-14-378"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    published = OpenClipScore(OpenClipScore.Config())
    published.load("cpu", 1)
    same = published.score(images, prompts(TEXTS)).values
    np.testing.assert_array_equal(same, reward.score(images, prompts(TEXTS)).values)


def test_a_run_can_ask_for_it_and_any_prompt_will_do(folder, images):
    config = REWARDS["open_clip_score"].Config(path=str(folder))
    scores = RewardWorker({"clip": config}).score(images, prompts(TEXTS))
    assert scores.failures == {} and scores.valid["clip"].all()
    assert judges("open_clip_score", Prompt(0, "a cat"))


def test_images_that_would_be_padded_are_refused(tmp_path):
    with pytest.raises(UserError, match="its images are padded or not square"):
        loaded(saved(tmp_path / "a", resize_mode="longest"))


def test_what_cannot_be_loaded_is_one_sentence(tmp_path):
    broken = saved(tmp_path / "broken")
    (broken / "open_clip_pytorch_model.bin").write_text("<html>not found</html>")
    cut = saved(tmp_path / "cut", suffix="safetensors")
    (cut / "open_clip_model.safetensors").write_bytes((cut / "open_clip_model.safetensors").read_bytes()[:5000])
    bare = saved(tmp_path / "bare")
    (bare / "open_clip_pytorch_model.bin").unlink()
    (tmp_path / "empty").mkdir()
    for path in (broken, cut, bare, tmp_path / "empty", "nobody/nothing"):
        with pytest.raises(UserError, match="open_clip_score cannot load .*give a hub id") as caught:
            loaded(path)
        assert "\n" not in str(caught.value)


def test_a_missing_open_clip_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install 'align-cluster\[rewards\]'"):
        OpenClipScore(OpenClipScore.Config()).load("cpu", 1)
