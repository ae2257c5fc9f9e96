import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from align_cluster.rewards.open_clip_score import OpenClipScore

from .helpers import CLIP_MEAN, CLIP_STD, batched, cosine, framed, open_clip_architecture, prompts, refusal

open_clip = pytest.importorskip("open_clip", reason="the extra 'rewards' is not installed")

TEXTS = ["a photo of a red circle", "A drawing of four stars, on a dark background", "a ring"]
LONG = "a very " + "red and green " * 40 + "circle"
SIDE = 42
MODEL = open_clip_architecture(SIDE, quick_gelu=True)  # DFN's ViT-H-14 in small
BYTES = 1.5 / 255 / 0.26  # what PIL's rounding to 8 bits, once a pass, may change in a normalised pixel


def saved(folder, suffix="bin", **preprocessing):
    """A tiny random checkpoint in the layout of open_clip's hub repositories."""
    folder.mkdir(exist_ok=True)
    prepared = {"mean": [*CLIP_MEAN], "std": [*CLIP_STD], "interpolation": "bicubic", **preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": prepared}))
    torch.manual_seed(0)
    weights = {name: value.contiguous() for name, value in open_clip.CLIP(**MODEL).state_dict().items()}
    if suffix == "bin":
        torch.save(weights, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def loaded(folder, **settings):
    reward = OpenClipScore(OpenClipScore.Config(**{"path": str(folder), **settings}))
    reward.load("cpu", 1)
    return reward


def write(folder):
    return saved(folder, resize_mode="squash")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("open_clip"))


@pytest.fixture(scope="module")
def reward(folder):
    return loaded(folder)


def by_hand(folder, image, tokens):
    """One cosine by plain calls: squashed by PIL, weights read into an architecture of own making."""
    model = open_clip.CLIP(**MODEL)
    model.load_state_dict(torch.load(folder / "open_clip_pytorch_model.bin"))
    with torch.no_grad():
        seen = model.eval().visual(batched(framed(image, SIDE, SIDE)))
        return cosine(seen[0], model.encode_text(tokens)[0])


def test_equals_an_independent_computation(folder, reward, smooth):
    tokens = open_clip.get_tokenizer("ViT-H-14")(TEXTS)
    expected = [by_hand(folder, image, tokens[i : i + 1]) for i, image in enumerate(smooth)]
    result = reward.score(smooth, prompts(TEXTS))
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


def test_prompts_are_cut_after_77_tokens(folder, reward, smooth):
    tokenizer = open_clip.SimpleTokenizer()
    tokens = torch.tensor([[tokenizer.sot_token_id, *tokenizer.encode(LONG)[:75], tokenizer.eot_token_id]])
    value = reward.score(smooth[:1], prompts([LONG])).values[0]
    assert value == pytest.approx(by_hand(folder, smooth[0], tokens), abs=1e-5)
    assert value == reward.score(smooth[:1], prompts([LONG + " and a square"])).values[0]


def test_safetensors_are_read_too(reward, smooth, tmp_path):
    same = loaded(saved(tmp_path / "a", suffix="safetensors", resize_mode="squash")).score(smooth, prompts(TEXTS))
    np.testing.assert_array_equal(same.values, reward.score(smooth, prompts(TEXTS)).values)


def test_a_hub_id_is_read_from_the_hubs_cache(folder, reward, smooth, hub):
    identity = OpenClipScore.Config().path
    assert identity == "apple/DFN5B-CLIP-ViT-H-14-378"
    hub(identity, *folder.iterdir())
    same = loaded(identity).score(smooth, prompts(TEXTS)).values
    np.testing.assert_array_equal(same, reward.score(smooth, prompts(TEXTS)).values)


def test_images_that_would_be_padded_are_refused(tmp_path):
    saved(tmp_path, resize_mode="longest")
    refusal("its images are padded or not square", loaded, tmp_path)


def test_what_cannot_be_loaded_is_one_sentence(tmp_path):
    broken = saved(tmp_path / "broken")
    (broken / "open_clip_pytorch_model.bin").write_text("<html>not found</html>")
    cut = saved(tmp_path / "cut", suffix="safetensors")
    (cut / "open_clip_model.safetensors").write_bytes((cut / "open_clip_model.safetensors").read_bytes()[:5000])
    bare = saved(tmp_path / "bare")
    (bare / "open_clip_pytorch_model.bin").unlink()
    for path in (broken, cut, bare):
        refusal("open_clip_score cannot load .*give a hub id", loaded, path)
