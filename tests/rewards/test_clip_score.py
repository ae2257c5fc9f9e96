import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from align_cluster.embedded import scene
from align_cluster.embedded.render import render
from align_cluster.embedded.tokenizer import build
from align_cluster.rewards.clip_score import ClipScore
from align_cluster.types import Prompt, UserError

TEXTS = ["a photo of a red circle", "a drawing of four stars on a dark background", "a photo of a ring"]
LONG = "a " + "red " * 40 + "circle"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random CLIPModel on disk, with the processor configuration of the published checkpoints at 32 px."""
    folder, tokenizer = tmp_path_factory.mktemp("clip"), build()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": 3, "bos_token_id": 2}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(checkpoint):
    reward = ClipScore(ClipScore.Config(path=str(checkpoint)))
    reward.load("cpu", 1)
    return reward


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)


def prompts(texts):
    return [Prompt(i, text) for i, text in enumerate(texts)]


def framed(image, width, height):
    """PIL's bicubic without its rounding to 8 bits: image uint8 [H, W, 3] as floats [height, width, 3] in [0, 1]."""
    planes = []
    for channel in range(3):
        plane = Image.fromarray(image[:, :, channel].astype(np.float32) / 255)  # mode F
        for size in ((width, image.shape[0]), (width, height)):
            plane = Image.fromarray(np.asarray(plane.resize(size, Image.Resampling.BICUBIC)).clip(0, 1))
        planes.append(np.asarray(plane))
    return np.stack(planes, -1)


def test_equals_an_independent_computation(checkpoint, reward, images):
    model, tokenizer = CLIPModel.from_pretrained(checkpoint), build()
    expected = []
    for image, text in zip(images, TEXTS, strict=True):
        mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
        pixels = torch.tensor((framed(image, 42, 32)[:, 5:37] - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            out = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), pixel_values=pixels)
        expected.append((out.logits_per_image / model.logit_scale.exp()).item())
    result = reward.score(images, prompts(TEXTS))
    np.testing.assert_allclose(result.values, expected, atol=1e-5)
    assert result.valid.all() and result.values.dtype == np.float64
    assert np.ptp(expected) > 1e-3


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
    assert crossed[0] != pytest.approx(straight[1], abs=1e-6)


def floats(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def test_the_differentiable_score_is_the_score(reward, images):
    values = reward.differentiable(floats(images).requires_grad_(), prompts(TEXTS))
    assert values.shape == (3,) and values.dtype == torch.float32
    np.testing.assert_allclose(values.detach(), reward.score(images, prompts(TEXTS)).values, atol=1e-6)


def test_the_gradient_to_the_pixels_is_that_of_finite_differences(reward, images):
    pixels = (0.2 + 0.6 * floats(images)).requires_grad_()  # room for the steps: the preprocessing clamps
    reward.differentiable(pixels, prompts(TEXTS)).sum().backward()
    assert all(parameter.grad is None for parameter in reward.clip.model.parameters())
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


@pytest.mark.parametrize(("height", "width"), [(32, 39), (41, 32), (20, 27), (64, 64), (32, 32)])
def test_images_are_cropped_as_by_the_official_processor(checkpoint, reward, height, width):
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([rows * 3, columns * 3, 90 + 60 * np.sin(rows / 5 + columns / 3)], -1).astype(np.uint8)
    official = CLIPImageProcessorPil.from_pretrained(checkpoint)(images=[image], return_tensors="pt")["pixel_values"]
    mine = (reward.clip._cropped(floats(image[None])) - reward.clip.mean) / reward.clip.std
    assert (mine - official).abs().max() < 1.5 / 255 / 0.26  # the processor rounds to 8 bits


def test_the_preprocessing_is_that_of_the_checkpoint(checkpoint, images, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    old = {  # as the first checkpoints have it, with other numbers
        "crop_size": 32,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 3,
        "size": 32,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    reward = ClipScore(ClipScore.Config(path=str(tmp_path)))
    reward.load("cpu", 1)
    assert reward.clip.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert reward.clip.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"size": {"height": 32, "width": 32}}, "its images have size .*height"),
        ({"crop_size": {"height": 24, "width": 24}}, "its images have crop_size"),
        ({"resample": 2}, "its images have resample 2"),
        ({"do_center_crop": False}, "its images have do_center_crop False"),
    ],
)
def test_preprocessing_that_is_none_of_clips_is_refused(checkpoint, tmp_path, change, complaint):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=complaint):
        ClipScore(ClipScore.Config(path=str(tmp_path))).load("cpu", 1)


def test_a_checkpoint_without_one_of_its_towers_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    text = {name: value for name, value in weights.items() if "vision" not in name and "visual" not in name}
    save_file(text, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the checkpoint has no .*vis"):
        ClipScore(ClipScore.Config(path=str(tmp_path))).load("cpu", 1)


def test_a_broken_checkpoint_is_one_sentence(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="clip_score cannot load") as caught:
        ClipScore(ClipScore.Config(path=str(tmp_path))).load("cpu", 1)
    assert "\n" not in str(caught.value)


def test_text_beyond_the_models_length_is_cut(reward, images):
    assert np.isfinite(reward.score(images[:1], prompts([LONG])).values).all()


def test_a_missing_checkpoint_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="clip_score cannot load .*preprocessor_config.json"):
        ClipScore(ClipScore.Config(path=str(tmp_path))).load("cpu", 1)


def test_the_shipped_model_prefers_an_image_to_another_prompts_image():
    reward = ClipScore(ClipScore.Config())
    reward.load("cpu", 1)
    records = [record for task in scene.TASKS for record in scene.prompts(task, "held_out")[:12]]
    images = render(records, 3).permute(0, 2, 3, 1).numpy()
    asked = prompts([record["prompt"] for record in records])
    own, other = reward.score(images, asked).values, reward.score(np.roll(images, 17, axis=0), asked).values
    assert (own > other).mean() >= 0.9
