import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from align_cluster.rewards.image_reward import ImageReward, text_tower, vision_tower

from .helpers import CLIP_MEAN, CLIP_STD, middle, prompts, refusal

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a photo of red circle star ##s , very and four [ enc ]".split()
ID = {word: place for place, word in enumerate(WORDS)} | {"[DEC]": len(WORDS), "[ENC]": len(WORDS) + 1}
TEXTS = ["A photo of four stars, RED", "a circle", "a very red circle and a star, of zinc"]
TOKENS = ["a photo of four star ##s , red", "a circle", "a very red circle and a star , of [UNK]"]
VISION_WIDTH, PATCH, SIDE, LAYERS = 128, 8, 24, 2
MED = {  # the official med_config.json in small
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": 3,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(WORDS) + 2,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def official_shapes():
    """Names and shapes of the official checkpoint, at the sizes above."""
    v, t, inner = VISION_WIDTH, MED["hidden_size"], MED["intermediate_size"]
    linear, norm = {}, {}
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, v),
        "blip.visual_encoder.pos_embed": (1, (SIDE // PATCH) ** 2 + 1, v),
        "blip.visual_encoder.patch_embed.proj.weight": (v, 3, PATCH, PATCH),
        "blip.visual_encoder.patch_embed.proj.bias": (v,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (MED["vocab_size"], t),
        "blip.text_encoder.embeddings.position_embeddings.weight": (MED["max_position_embeddings"], t),
    }
    norm["blip.visual_encoder.norm"], norm["blip.text_encoder.embeddings.LayerNorm"] = v, t
    linear["blip.vision_proj"], linear["blip.text_proj"] = (16, v), (16, t)
    for n in range(LAYERS):
        block = f"blip.visual_encoder.blocks.{n}."
        norm[block + "norm1"] = norm[block + "norm2"] = v
        linear[block + "attn.qkv"], linear[block + "attn.proj"] = (3 * v, v), (v, v)
        linear[block + "mlp.fc1"], linear[block + "mlp.fc2"] = (4 * v, v), (v, 4 * v)
        layer = f"blip.text_encoder.encoder.layer.{n}."
        for attention, seen in (("attention", t), ("crossattention", v)):
            linear[f"{layer}{attention}.self.query"] = (t, t)
            linear[f"{layer}{attention}.self.key"] = linear[f"{layer}{attention}.self.value"] = (t, seen)
            linear[f"{layer}{attention}.output.dense"] = (t, t)
            norm[f"{layer}{attention}.output.LayerNorm"] = t
        linear[layer + "intermediate.dense"], linear[layer + "output.dense"] = (inner, t), (t, inner)
        norm[layer + "output.LayerNorm"] = t
    for place, size in zip((0, 2, 4, 6, 7), ((1024, t), (128, 1024), (64, 128), (16, 64), (1, 16)), strict=True):
        linear[f"mlp.layers.{place}"] = size
    for name, (rows, columns) in linear.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for name, size in norm.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    return shapes


def official_weights():
    """A random state dict in the official layout. No two tensors are alike, so that every swapped name shows."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in official_shapes().items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name.lower():
            weights[name] = 0.3 * noise + name.endswith("weight")
        elif len(shape) == 2 and "embeddings" not in name:
            weights[name] = (1 if name.startswith("mlp") else 1.5) * noise * shape[1] ** -0.5
        else:
            weights[name] = 0.3 * noise
    positions = torch.arange(MED["max_position_embeddings"])[None]
    return weights | {"blip.text_encoder.embeddings.position_ids": positions}


def write(folder):
    from transformers import BertTokenizer

    torch.save(official_weights(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(WORDS)})
    tokenizer.save_pretrained(folder / "bert-base-uncased")
    return folder


@pytest.fixture(scope="module")
def weights():
    return official_weights()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("image_reward"))


def loaded(folder, **settings):
    paths = {"path": str(folder), "tokenizer": str(folder / "bert-base-uncased")}
    reward = ImageReward(ImageReward.Config(**{**paths, **settings}))
    reward.load("cpu", 1)
    return reward


@pytest.fixture(scope="module")
def reward(folder):
    return loaded(folder)


# ---- BLIP by hand: plain torch on the official names, one image and one unpadded text at a time ----


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def normed(weights, name, x, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(query, key, value, heads):
    """Attention over the tokens of [N, C], in `heads` heads of neighbouring channels."""
    out = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        out.append((q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    return torch.cat(out, -1)


def vit(weights, pixels):
    """Image tokens [1 + N, C] of normalised pixels [3, S, S], after timm's ViT as BLIP has it."""
    w = {name.removeprefix("blip.visual_encoder."): value for name, value in weights.items()}
    tokens = []
    for top in range(0, SIDE, PATCH):
        for left in range(0, SIDE, PATCH):
            patch = pixels[:, top : top + PATCH, left : left + PATCH].flatten()
            tokens.append(w["patch_embed.proj.weight"].flatten(1) @ patch + w["patch_embed.proj.bias"])
    x = torch.cat([w["cls_token"][0], torch.stack(tokens)]) + w["pos_embed"][0]
    for n in range(LAYERS):
        query, key, value = linear(w, f"blocks.{n}.attn.qkv", normed(w, f"blocks.{n}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(w, f"blocks.{n}.attn.proj", attend(query, key, value, VISION_WIDTH // 64))
        hidden = F.gelu(linear(w, f"blocks.{n}.mlp.fc1", normed(w, f"blocks.{n}.norm2", x, 1e-6)))
        x = x + linear(w, f"blocks.{n}.mlp.fc2", hidden)
    return normed(w, "norm", x, 1e-6)


def bert(weights, ids, seen):
    """States [L, C] of the tokens `ids`, after every layer has looked at the text and then at `seen` [N, V]."""
    w = {name.removeprefix("blip.text_encoder."): value for name, value in weights.items()}
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = normed(w, "embeddings.LayerNorm", x, 1e-12)
    for n in range(LAYERS):
        for attention in ("attention", "crossattention"):
            name = f"encoder.layer.{n}.{attention}."
            other = seen if attention == "crossattention" else x
            query = linear(w, name + "self.query", x)
            key, value = linear(w, name + "self.key", other), linear(w, name + "self.value", other)
            out = linear(w, name + "output.dense", attend(query, key, value, MED["num_attention_heads"]))
            x = normed(w, name + "output.LayerNorm", x + out, 1e-12)
        out = linear(
            w, f"encoder.layer.{n}.output.dense", F.gelu(linear(w, f"encoder.layer.{n}.intermediate.dense", x))
        )
        x = normed(w, f"encoder.layer.{n}.output.LayerNorm", x + out, 1e-12)
    return x


def prepared(image):
    """The official preprocessing, but without its rounding: fp64 [3, S, S]."""
    return ((middle(image, SIDE) - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)


def by_hand(weights, image, words):
    """One score in fp64. `words` are the tokens between [CLS] and [SEP]."""
    weights = {name: value.double() for name, value in weights.items()}
    ids = [ID["[CLS]"], *(ID[word] for word in words.split()), ID["[SEP]"]]
    x = bert(weights, ids, vit(weights, torch.tensor(prepared(image))))[0]
    for place in (0, 2, 4, 6, 7):
        x = linear(weights, f"mlp.layers.{place}", x)
    return (x.item() - 0.16717362830052426) / 1.0333394966054072


# ---- the tests ----


def test_the_vision_tower_is_blips_under_transformers_names(weights):
    prefix = "blip.visual_encoder."
    tower = vision_tower({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}).eval()
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = tower(pixel_values=pixels).last_hidden_state
    for image, state in zip(pixels, states, strict=True):
        torch.testing.assert_close(state, vit(weights, image), rtol=0, atol=1e-4)


def test_the_text_tower_is_blips_and_padding_is_not_seen(weights):
    prefix = "blip.text_encoder."
    entries = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    tower = text_tower(entries, MED, VISION_WIDTH).eval()
    seen = torch.randn(1, 7, VISION_WIDTH, generator=torch.Generator().manual_seed(1))
    ids = [2, 5, 8, 9, 3]
    with torch.no_grad():
        states = tower(
            input_ids=torch.tensor([ids + [0] * 4]),
            attention_mask=torch.tensor([[1] * 5 + [0] * 4]),
            encoder_hidden_states=seen,
        ).last_hidden_state
    torch.testing.assert_close(states[0, :5], bert(weights, ids, seen[0]), rtol=0, atol=1e-4)


def test_equals_an_independent_computation(weights, reward, smooth):
    expected = [by_hand(weights, image, words) for image, words in zip(smooth, TOKENS, strict=True)]
    result = reward.score(smooth, prompts(TEXTS))
    np.testing.assert_allclose(result.values, expected, atol=2e-4)
    assert result.valid.all() and result.values.dtype == np.float64
    assert np.ptp(expected) > 0.1


def test_equals_the_official_transform_but_for_its_rounding_to_8_bits(reward, smooth):
    transforms = pytest.importorskip("torchvision.transforms")

    resize = transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BICUBIC)
    official = transforms.Compose([resize, transforms.CenterCrop(SIDE)])
    small = np.stack([np.asarray(official(Image.fromarray(image))) for image in smooth])
    scores = reward.score(smooth, prompts(TEXTS)).values
    np.testing.assert_allclose(scores, reward.score(small, prompts(TEXTS)).values, atol=0.03 * np.ptp(scores))


def test_every_image_meets_its_own_prompt_and_no_other(reward, smooth):
    rows = []
    watch = reward.text.register_forward_hook(lambda module, args, out: rows.append(len(out.last_hidden_state)))
    reward.score(smooth, prompts(TEXTS))
    watch.remove()
    assert rows == [3]  # pairs, and not nine


def test_prompts_are_cut_after_35_tokens(weights, reward, smooth):
    long = "very " * 32 + "red star and a circle"
    value = reward.score(smooth[:1], prompts([long])).values[0]
    assert value == pytest.approx(by_hand(weights, smooth[0], "very " * 32 + "red"), abs=2e-4)
    assert value == reward.score(smooth[:1], prompts([long + " and a photo"])).values[0]


def test_blips_own_tokens_are_tokens_of_a_prompt_as_officially(weights, reward, smooth):
    value = reward.score(smooth[:1], prompts(["a [ENC] red [DEC]"])).values[0]
    assert value == pytest.approx(by_hand(weights, smooth[0], "a [ENC] red [DEC]"), abs=2e-4)


def test_a_hub_id_is_read_from_the_hubs_cache(folder, reward, smooth, hub):
    hub("THUDM/ImageReward", folder / "ImageReward.pt", folder / "med_config.json")
    same = loaded(folder, path=ImageReward.Config().path).score(smooth, prompts(TEXTS)).values
    np.testing.assert_array_equal(same, reward.score(smooth, prompts(TEXTS)).values)


def refused(folder, **settings):
    return refusal("image_reward cannot load .* with ImageReward.pt and med_config.json", loaded, folder, **settings)


def test_what_cannot_be_loaded_is_one_sentence(folder, weights, tmp_path):
    refused(folder, path=str(tmp_path))
    refused(folder, path="nobody/nothing")
    refused(folder, tokenizer="nobody/nothing")
    (tmp_path / "med_config.json").write_text(json.dumps(MED))
    for wrong in ({}, {"blip.visual_encoder.norm.weight": torch.zeros(2)}, torch.zeros(2)):
        torch.save(wrong, tmp_path / "ImageReward.pt")
        refused(folder, path=str(tmp_path))
    (tmp_path / "ImageReward.pt").write_text("<html>not found</html>")
    refused(folder, path=str(tmp_path))


def test_a_checkpoint_with_one_tensor_missing_or_more_is_refused(folder, weights, tmp_path):
    (tmp_path / "med_config.json").write_text(json.dumps(MED))
    key = "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"
    for other in (
        {name: value for name, value in weights.items() if name != key},
        weights | {key.replace("layer.1", "layer.2"): weights[key]},
    ):
        torch.save(other, tmp_path / "ImageReward.pt")
        assert "crossattention.self.key" in refused(folder, path=str(tmp_path))


def test_a_tokenizer_of_another_vocabulary_is_refused(folder, tmp_path):
    from transformers import BertTokenizer

    BertTokenizer(vocab={word: place for place, word in enumerate([*WORDS, "zinc"])}).save_pretrained(tmp_path)
    message = refused(folder, tokenizer=str(tmp_path))
    assert f"has {len(WORDS) + 3} tokens with BLIP's two, and the checkpoint {len(WORDS) + 2}" in message
