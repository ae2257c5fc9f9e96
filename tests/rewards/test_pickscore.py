import json

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from align_cluster.rewards.pickscore import PickScore

from .helpers import batched, cosine, middle, prompts

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


def write(folder):
    """`model` has a tiny random CLIPModel; `processor` a tokenizer in CLIP's old layout and the preprocessing."""
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pickscore"))


def loaded(folder, **settings):
    paths = {"path": str(folder / "model"), "processor": str(folder / "processor")}
    reward = PickScore(PickScore.Config(**{**paths, **settings}))
    reward.load("cpu", 1)
    return reward


@pytest.fixture(scope="module")
def reward(folder):
    return loaded(folder)


def by_hand(folder, image, text):
    """The model card's computation for one pair, with own preprocessing: a raw score."""
    model = CLIPModel.from_pretrained(folder / "model")
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(batched(middle(image, 32))).pooler_output)
        read = model.text_projection(model.text_model(tokens(text)).last_hidden_state[0, -1])
        return TEMPERATURE * cosine(seen[0], read)


@pytest.mark.parametrize(("scale", "factor"), [("raw", 1), ("flow_grpo", 1 / 26), ("cosine", 1 / TEMPERATURE)])
def test_equals_an_independent_computation_at_every_scale(folder, images, scale, factor):
    expected = [by_hand(folder, image, text) * factor for image, text in zip(images, TEXTS, strict=True)]
    result = loaded(folder, scale=scale).score(images, prompts(TEXTS))
    np.testing.assert_allclose(result.values, expected, atol=1e-5 * TEMPERATURE * factor)
    assert result.valid.all() and result.values.dtype == np.float64
    assert np.ptp(expected) > 1e-2 * TEMPERATURE * factor


def test_prompts_are_cut_after_77_tokens(folder, reward, images):
    assert tokens(LONG).shape == (1, 77)
    value = reward.score(images[:1], prompts([LONG])).values[0]
    assert value == pytest.approx(by_hand(folder, images[0], LONG), abs=1e-3)
    assert value == reward.score(images[:1], prompts([LONG + " and a square"])).values[0]


def test_hub_ids_are_read_from_the_hubs_cache(folder, reward, images, hub):
    config = PickScore.Config()
    hub(config.path, *(folder / "model").iterdir())
    hub(config.processor, *(folder / "processor").iterdir())
    published = PickScore(config)
    published.load("cpu", 1)
    same = published.score(images, prompts(TEXTS)).values
    np.testing.assert_array_equal(same, reward.score(images, prompts(TEXTS)).values)


def test_the_default_is_the_published_model_at_its_own_scale():
    config = PickScore.Config()
    assert config.path == "yuvalkirstain/PickScore_v1"
    assert config.processor == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert config.scale == "raw"
