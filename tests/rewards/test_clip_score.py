import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from align_cluster.embedded import scene
from align_cluster.embedded.render import render
from align_cluster.pretraining.networks import new_tokenizer
from align_cluster.rewards.clip_score import ClipScore

from .helpers import batched, floats, middle, prompts, refusal

TEXTS = ["a photo of a red circle", "a drawing of four stars on a dark background", "a photo of a ring"]
LONG = "a " + "red " * 40 + "circle"


def write(folder):
    """A tiny random CLIPModel, with the processor configuration of the published checkpoints at 32 px."""
    tokenizer = new_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": 3, "bos_token_id": 2}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def loaded(folder, **settings):
    reward = ClipScore(ClipScore.Config(**{"path": str(folder), **settings}))
    reward.load("cpu", 1)
    return reward


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def reward(folder):
    return loaded(folder)


def test_equals_an_independent_computation(folder, reward, images):
    model, tokenizer = CLIPModel.from_pretrained(folder), new_tokenizer()
    expected = []
    for image, text in zip(images, TEXTS, strict=True):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), pixel_values=batched(middle(image, 32)))
        expected.append((out.logits_per_image / model.logit_scale.exp()).item())
    result = reward.score(images, prompts(TEXTS))
    np.testing.assert_allclose(result.values, expected, atol=1e-5)
    assert result.valid.all() and result.values.dtype == np.float64
    assert np.ptp(expected) > 1e-3


@pytest.mark.parametrize(("height", "width"), [(32, 39), (41, 32), (20, 27), (64, 64), (32, 32)])
def test_images_are_cropped_as_by_the_official_processor(folder, reward, height, width):
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([rows * 3, columns * 3, 90 + 60 * np.sin(rows / 5 + columns / 3)], -1).astype(np.uint8)
    official = CLIPImageProcessorPil.from_pretrained(folder)(images=[image], return_tensors="pt")["pixel_values"]
    mine = (reward.clip._cropped(floats(image[None])) - reward.clip.mean) / reward.clip.std
    assert (mine - official).abs().max() < 1.5 / 255 / 0.26  # the processor rounds to 8 bits


def test_the_preprocessing_is_that_of_the_checkpoint(folder, images, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
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
    reward = loaded(tmp_path)
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
def test_preprocessing_that_is_none_of_clips_is_refused(folder, tmp_path, change, complaint):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refusal(complaint, loaded, tmp_path)


def test_a_checkpoint_without_one_of_its_towers_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    text = {name: value for name, value in weights.items() if "vision" not in name and "visual" not in name}
    save_file(text, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refusal("the checkpoint has no .*vis", loaded, tmp_path)


def test_a_broken_checkpoint_is_one_sentence(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"<html>not found</html>")
    refusal("clip_score cannot load", loaded, tmp_path)


def test_a_missing_checkpoint_is_one_sentence(tmp_path):
    refusal("clip_score cannot load .*preprocessor_config.json", loaded, tmp_path)


def test_text_beyond_the_models_length_is_cut(reward, images):
    assert np.isfinite(reward.score(images[:1], prompts([LONG])).values).all()


def test_the_shipped_model_prefers_an_image_to_another_prompts_image():
    reward = loaded("embedded")
    records = [record for task in scene.TASKS for record in scene.prompts(task, "held_out")[:12]]
    images = render(records, 3).permute(0, 2, 3, 1).numpy()
    asked = prompts([record["prompt"] for record in records])
    own, other = reward.score(images, asked).values, reward.score(np.roll(images, 17, axis=0), asked).values
    assert (own > other).mean() >= 0.9
