import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from align_cluster.config.check import judges
from align_cluster.rewards import REWARDS
from align_cluster.rewards.pickscore import PickScore
from align_cluster.rewards.worker import RewardWorker
from align_cluster.types import Prompt, UserError

TEXTS = ["a photo of a red circle", "A drawing of four STARS on a dark background", "a ring"]
LONG = "a very " + "red and green " * 12 + "circle"
TEMPERATURE = 98.5
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
END = "<|endoftext|>"


def tokens(text):
    """CLIP's tokens [1, L] by a vocabulary of single letters, cut to 77."""
    words = [token for word in text.lower().split() for token in (*word[:-1], word[-1] + "</w>")]
    return torch.tensor([[VOCABULARY.index(token) for token in ("<|startoftext|>", *words[:75], END)]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model` has a tiny random CLIPModel; `processor` a tokenizer in CLIP's old layout and the preprocessing."""
    folder = tmp_path_factory.mktemp("pickscore")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    # eos_token_id 2 is that of the published file: no token's number, but "the largest number ends a text".
    text = {**tower, "vocab_size": len(VOCABULARY), "max_position_embeddings": 77, "eos_token_id": 2, "bos_token_id": 0}
    vision = {**tower, "image_size": 32, "patch_size": 8, "hidden_act": "gelu"}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.logit_scale.data.fill_(np.log(TEMPERATURE))
    model.save_pretrained(folder / "model")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder / "processor")
    model.config.save_pretrained(folder / "processor")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    special = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": END}
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    (folder / "processor" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "processor" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "processor" / "tokenizer_config.json").write_text(json.dumps(settings | special))
    return folder


def loaded(folder, **settings):
    paths = {"path": str(folder / "model"), "processor": str(folder / "processor")}
    reward = PickScore(PickScore.Config(**{**paths, **settings}))
    reward.load("cpu", 1)
    return reward


@pytest.fixture(scope="module")
def reward(folder):
    return loaded(folder)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)


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


def by_hand(folder, image, text):
    """The model card's computation for one pair, with own preprocessing: a raw score."""
    model = CLIPModel.from_pretrained(folder / "model")
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor((framed(image, 42, 32)[:, 5:37] - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)[0].double().numpy()
        read = model.text_projection(model.text_model(tokens(text)).last_hidden_state[0, -1]).double().numpy()
    return TEMPERATURE * (seen / np.linalg.norm(seen)) @ (read / np.linalg.norm(read))


@pytest.mark.parametrize(("scale", "factor"), [("raw", 1), ("flow_grpo", 1 / 26), ("cosine", 1 / TEMPERATURE)])
def test_equals_an_independent_computation_at_every_scale(folder, images, scale, factor):
    expected = [by_hand(folder, image, text) * factor for image, text in zip(images, TEXTS, strict=True)]
    result = loaded(folder, scale=scale).score(images, prompts(TEXTS))
    np.testing.assert_allclose(result.values, expected, atol=1e-5 * TEMPERATURE * factor)
    assert result.valid.all() and result.values.dtype == np.float64
    assert np.ptp(expected) > 1e-2 * TEMPERATURE * factor


def test_a_batch_scores_as_its_images_do_one_by_one(reward, images):
    batch = reward.score(images, prompts(TEXTS)).values
    singles = [reward.score(images[i : i + 1], prompts(TEXTS[i : i + 1])).values[0] for i in range(3)]
    np.testing.assert_allclose(batch, singles, atol=1e-4)


def test_every_image_meets_its_own_prompt(reward, images):
    crossed = reward.score(images[[0, 1, 0]], prompts([TEXTS[1], TEXTS[0], TEXTS[0]])).values
    straight = reward.score(images[:2], prompts(TEXTS[:2])).values
    assert crossed[2] == pytest.approx(straight[0], abs=1e-4)
    assert abs(crossed[0] - straight[1]) > 1e-2


@pytest.mark.parametrize("scale", ["raw", "flow_grpo", "cosine"])
def test_the_differentiable_score_is_the_score(folder, images, scale):
    reward = loaded(folder, scale=scale)
    values = reward.differentiable(floats(images).requires_grad_(), prompts(TEXTS))
    assert values.shape == (3,) and values.dtype == torch.float32
    np.testing.assert_allclose(values.detach(), reward.score(images, prompts(TEXTS)).values, atol=1e-4)


def test_the_gradient_to_the_pixels_is_that_of_finite_differences(reward, images):
    pixels = (0.2 + 0.6 * floats(images)).requires_grad_()
    reward.differentiable(pixels, prompts(TEXTS)).sum().backward()
    assert all(parameter.grad is None for parameter in reward.clip.model.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        step = 3e-3 * torch.randn(pixels.shape, generator=generator)
        with torch.no_grad():
            ahead, behind = (reward.differentiable(pixels + sign * step, prompts(TEXTS)) for sign in (1, -1))
        slopes = (pixels.grad * step).flatten(1).sum(1)
        assert slopes.abs().max() > 1e-3
        torch.testing.assert_close((ahead - behind) / 2, slopes, rtol=0, atol=0.02 * slopes.abs().max().item())


def test_prompts_are_cut_after_77_tokens(folder, reward, images):
    assert tokens(LONG).shape == (1, 77)
    value = reward.score(images[:1], prompts([LONG])).values[0]
    assert value == pytest.approx(by_hand(folder, images[0], LONG), abs=1e-3)
    assert value == reward.score(images[:1], prompts([LONG + " and a square"])).values[0]


def test_hub_ids_are_read_from_the_hubs_cache(folder, reward, images, tmp_path, monkeypatch):
    from huggingface_hub import constants

    config = PickScore.Config()
    for identity, part in ((config.path, "model"), (config.processor, "processor")):
        repository = tmp_path / f"models--{identity.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / ("0" * 40)).symlink_to(folder / part)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    published = PickScore(config)
    published.load("cpu", 1)
    same = published.score(images, prompts(TEXTS)).values
    np.testing.assert_array_equal(same, reward.score(images, prompts(TEXTS)).values)


def test_the_default_is_the_published_model_at_its_own_scale():
    config = PickScore.Config()
    assert config.path == "yuvalkirstain/PickScore_v1"
    assert config.processor == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert config.scale == "raw"


def test_a_run_can_ask_for_it_and_any_prompt_will_do(folder, images):
    config = REWARDS["pickscore"].Config(path=str(folder / "model"), processor=str(folder / "processor"))
    scores = RewardWorker({"preference": config}).score(images, prompts(TEXTS))
    assert scores.failures == {} and scores.valid["preference"].all()
    assert judges("pickscore", Prompt(0, "a cat"))


def test_missing_parts_are_one_sentence(folder, tmp_path):
    for settings in ({"path": str(tmp_path)}, {"processor": str(tmp_path)}, {"path": "nobody/nothing"}):
        with pytest.raises(UserError, match="pickscore cannot load .*give hub ids") as caught:
            loaded(folder, **settings)
        assert "\n" not in str(caught.value)
