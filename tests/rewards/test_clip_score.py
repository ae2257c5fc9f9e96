import numpy as np
import pytest
import torch
from PIL import Image
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


def test_equals_an_independent_computation(checkpoint, reward, images):
    model, tokenizer = CLIPModel.from_pretrained(checkpoint), build()
    expected = []
    for image, text in zip(images, TEXTS, strict=True):
        small = Image.fromarray(image).resize((42, 32), Image.Resampling.BICUBIC).crop((5, 0, 37, 32))
        mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
        pixels = torch.tensor((np.asarray(small) / 255 - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            out = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), pixel_values=pixels)
        expected.append((out.logits_per_image / model.logit_scale.exp()).item())
    result = reward.score(images, prompts(TEXTS))
    np.testing.assert_allclose(result.values, expected, atol=1e-4)
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
