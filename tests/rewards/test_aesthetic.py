import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from align_cluster.rewards.aesthetic import VERSIONS, Aesthetic

from .helpers import batched, framed, middle, prompts, refusal

SIDE, WIDTH = 28, 24
PROMPTS = prompts(["a cat", "a dog", "a cow"])
TOWER = {"image_size": SIDE, "patch_size": 14, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
TEXT = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class PublishedHead(nn.Module):
    """The head of either version as its authors wrote it, with the dropout."""

    def __init__(self, version):
        super().__init__()
        if version == "v1":
            drops, name = (0.2, 0.2, 0.1), "layers"
        else:
            drops, name = (0.5, 0.5, 0.5, 0.2), "scoring_head"
        sizes, modules = (WIDTH, 1024, 128, 64, 16, 1), []
        for place in range(5):
            modules.append(nn.Linear(sizes[place], sizes[place + 1]))
            if place < len(drops):
                modules.append(nn.Dropout(drops[place]))
        self.add_module(name, nn.Sequential(*modules))

    def forward(self, embeddings):
        return next(self.children())(embeddings)


def write(folder):
    """Tiny random checkpoints: a whole CLIPModel, a whole SiglipModel and the two heads, in the official layouts."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    torch.manual_seed(0)
    vision = TOWER | {"num_attention_heads": 2, "projection_dim": WIDTH}
    text = TEXT | {"projection_dim": WIDTH, "eos_token_id": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    siglip = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=TOWER | {"num_attention_heads": 2}))
    for model, name in ((clip, "v1"), (siglip, "v2.5")):
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
        head = PublishedHead(name)
        nn.init.constant_(list(head.parameters())[-1], 5.0)
        for parameter in head.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
        assert type(head.state_dict()) is OrderedDict
        torch.save(OrderedDict(head.state_dict()), folder / f"{name}.pth")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("aesthetic"))


def loaded(folder, version, **settings):
    paths = {"encoder": str(folder / version), "head": str(folder / f"{version}.pth")}
    reward = Aesthetic(Aesthetic.Config(**{"version": version, **paths, **settings}))
    reward.load("cpu", 1)
    return reward


@pytest.fixture(scope="module", params=["v1", "v2.5"])
def reward(folder, request):
    return loaded(folder, request.param)


def prepared(image, version):
    """The official preprocessing with PIL, of rows and then columns, but without its rounding: fp32 [1, 3, S, S]."""
    if version == "v1":
        return batched(middle(image, SIDE))
    return batched(framed(image, SIDE, SIDE), 0.5, 0.5)


def rated(folder, version, pixels):
    """One score, by the whole CLIP or SigLIP and the authors' head."""
    from transformers import CLIPModel, SiglipModel

    model = {"v1": CLIPModel, "v2.5": SiglipModel}[version].from_pretrained(folder / version).eval()
    head = PublishedHead(version).eval()
    head.load_state_dict(torch.load(folder / f"{version}.pth"))
    with torch.no_grad():
        embedding = model.get_image_features(pixel_values=pixels).pooler_output[0].double().numpy()
        return head(torch.tensor(embedding / np.linalg.norm(embedding), dtype=torch.float32)).item()


def test_equals_an_independent_computation(folder, reward, smooth):
    version = reward.config.version
    expected = [rated(folder, version, prepared(image, version)) for image in smooth]
    result = reward.score(smooth, PROMPTS)
    np.testing.assert_allclose(result.values, expected, atol=1e-4)
    assert result.valid.all() and result.values.dtype == np.float64
    assert np.ptp(expected) > 1e-2


def test_equals_the_official_processor_but_for_its_rounding_to_8_bits(folder, reward, smooth):
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    version = reward.config.version
    if version == "v1":
        size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        processor = CLIPImageProcessorPil(**size)
    else:
        processor = SiglipImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
    pixels = processor(images=list(smooth), return_tensors="np")["pixel_values"]
    expected = [rated(folder, version, torch.from_numpy(image)[None]) for image in pixels]
    np.testing.assert_allclose(reward.score(smooth, PROMPTS).values, expected, atol=0.02)


def test_the_embeddings_length_does_not_matter_and_the_head_is_linear(folder, smooth, tmp_path):
    weights = torch.load(folder / "v1.pth")
    weights["layers.7.bias"] += 1
    torch.save(weights, tmp_path / "higher.pth")
    higher = loaded(folder, "v1", head=str(tmp_path / "higher.pth")).score(smooth, PROMPTS).values
    plain = loaded(folder, "v1")
    values = plain.score(smooth, PROMPTS).values
    np.testing.assert_allclose(higher, values + 1, atol=1e-5)
    plain.encoder.visual_projection.weight.mul_(3)
    np.testing.assert_allclose(plain.score(smooth, PROMPTS).values, values, atol=1e-4)


def test_a_head_may_be_an_address(folder, smooth, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fetched = loaded(folder, "v2.5", head=(folder / "v2.5.pth").as_uri())
    assert list(tmp_path.rglob("v2.5.pth"))
    same = loaded(folder, "v2.5").score(smooth, PROMPTS).values
    np.testing.assert_array_equal(fetched.score(smooth, PROMPTS).values, same)


def test_a_head_may_be_a_file_at_the_hub(folder, smooth, hub):
    hub("trl-lib/ddpo-aesthetic-predictor", folder / "v1.pth")
    fetched = loaded(folder, "v1", head="trl-lib/ddpo-aesthetic-predictor/v1.pth")
    same = loaded(folder, "v1").score(smooth, PROMPTS).values
    np.testing.assert_array_equal(fetched.score(smooth, PROMPTS).values, same)


def test_the_default_is_the_published_v2_5():
    assert Aesthetic.Config().version == "v2.5"
    assert VERSIONS["v2.5"].encoder == "google/siglip-so400m-patch14-384"
    assert VERSIONS["v1"].encoder == "openai/clip-vit-large-patch14"


def test_what_cannot_be_loaded_is_one_sentence(folder, tmp_path):
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    torch.save({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "small.pth")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    torch.save({}, tmp_path / "empty.pth")
    heads = [str(path) for path in tmp_path.iterdir()]
    heads += [str(tmp_path / "no.pth"), "nobody/nothing/no.pth", "file:///no/such.pth", str(folder / "v2.5.pth")]
    cut = shutil.copytree(folder / "v1", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    wrong = [{"head": head} for head in heads] + [{"encoder": str(path)} for path in (tmp_path, cut, "nobody/nothing")]
    for settings in wrong:
        refusal("aesthetic v1 cannot load the encoder .* with the head", loaded, folder, "v1", **settings)


@pytest.mark.parametrize(("version", "other"), [("v1", "v2.5"), ("v2.5", "v1")])
def test_the_other_versions_encoder_is_refused_and_not_drawn_at_random(folder, version, other):
    refusal(f"aesthetic {version} cannot load", loaded, folder, version, encoder=str(folder / other))


def test_an_encoder_with_weights_missing_is_refused(folder, tmp_path):
    from transformers import CLIPTextModelWithProjection

    CLIPTextModelWithProjection.from_pretrained(folder / "v1").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "v1" / "config.json").read_text())
    refusal("weights are missing", loaded, folder, "v1", encoder=str(tmp_path))
