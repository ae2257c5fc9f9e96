from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from align_cluster.config.check import judges
from align_cluster.rewards import REWARDS
from align_cluster.rewards.aesthetic import VERSIONS, Aesthetic
from align_cluster.rewards.worker import RewardWorker
from align_cluster.types import Prompt, UserError

SIDE, WIDTH = 28, 24
NORMALISATION = {
    "v1": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "v2.5": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny random checkpoints: a whole CLIPModel, a whole SiglipModel and the two heads, in the official layouts."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    folder = tmp_path_factory.mktemp("aesthetic")
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


def loaded(folder, version, **settings):
    paths = {"encoder": str(folder / version), "head": str(folder / f"{version}.pth")}
    reward = Aesthetic(Aesthetic.Config(**{"version": version, **paths, **settings}))
    reward.load("cpu", 1)
    return reward


@pytest.fixture(scope="module", params=["v1", "v2.5"])
def reward(folder, request):
    return loaded(folder, request.param)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 10, 13, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((52, 40), Image.Resampling.BILINEAR)) for image in coarse]
    )


def prompts(images):
    return [Prompt(i, f"prompt {i}") for i in range(len(images))]


def prepared(image, version):
    """The official preprocessing with PIL, of rows and then columns, but without its rounding: fp64 [3, S, S]."""
    height, width = image.shape[:2]
    if version == "v1":
        height, width = SIDE * height // min(height, width), SIDE * width // min(height, width)
    else:
        height, width = SIDE, SIDE
    planes = [image[:, :, channel].astype(np.float32) / 255 for channel in range(3)]
    for size in ((width, image.shape[0]), (width, height)):
        planes = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)).clip(0, 1) for p in planes]
    top, left = round((height - SIDE) / 2), round((width - SIDE) / 2)
    mean, std = NORMALISATION[version]
    pixels = np.stack(planes, -1)[top : top + SIDE, left : left + SIDE]
    return ((pixels - np.array(mean)) / np.array(std)).transpose(2, 0, 1)


def rated(folder, version, pixels):
    """One score, by the whole CLIP or SigLIP and the authors' head."""
    from transformers import CLIPModel, SiglipModel

    model = {"v1": CLIPModel, "v2.5": SiglipModel}[version].from_pretrained(folder / version).eval()
    head = PublishedHead(version).eval()
    head.load_state_dict(torch.load(folder / f"{version}.pth"))
    pixels = torch.tensor(pixels, dtype=torch.float32)[None]
    with torch.no_grad():
        embedding = model.get_image_features(pixel_values=pixels).pooler_output[0].double().numpy()
        return head(torch.tensor(embedding / np.linalg.norm(embedding), dtype=torch.float32)).item()


def test_equals_an_independent_computation(folder, reward, images):
    version = reward.config.version
    expected = [rated(folder, version, prepared(image, version)) for image in images]
    result = reward.score(images, prompts(images))
    np.testing.assert_allclose(result.values, expected, atol=1e-4)
    assert result.valid.all() and result.values.dtype == np.float64
    assert np.ptp(expected) > 1e-2


def test_equals_the_official_processor_but_for_its_rounding_to_8_bits(folder, reward, images):
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    version = reward.config.version
    if version == "v1":
        size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        processor = CLIPImageProcessorPil(**size)
    else:
        mean, std = NORMALISATION[version]
        processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=mean, image_std=std)
    pixels = processor(images=list(images), return_tensors="np")["pixel_values"]
    expected = [rated(folder, version, image) for image in pixels]
    np.testing.assert_allclose(reward.score(images, prompts(images)).values, expected, atol=0.02)


def test_the_embeddings_length_does_not_matter_and_the_head_is_linear(folder, images, tmp_path):
    weights = torch.load(folder / "v1.pth")
    weights["layers.7.bias"] += 1
    torch.save(weights, tmp_path / "higher.pth")
    higher = loaded(folder, "v1", head=str(tmp_path / "higher.pth")).score(images, prompts(images)).values
    plain = loaded(folder, "v1")
    values = plain.score(images, prompts(images)).values
    np.testing.assert_allclose(higher, values + 1, atol=1e-5)
    plain.encoder.visual_projection.weight.mul_(3)
    np.testing.assert_allclose(plain.score(images, prompts(images)).values, values, atol=1e-4)


def test_a_batch_scores_as_its_images_do_one_by_one(reward, images):
    batch = reward.score(images, prompts(images)).values
    singles = [reward.score(images[i : i + 1], [Prompt(9, "whatever")]).values[0] for i in range(3)]
    np.testing.assert_allclose(batch, singles, atol=1e-4)


def floats(images):
    return torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2)


def test_the_differentiable_score_is_the_score(reward, images):
    values = reward.differentiable(floats(images).requires_grad_(), prompts(images))
    assert values.shape == (3,) and values.dtype == torch.float32
    np.testing.assert_allclose(values.detach(), reward.score(images, prompts(images)).values, atol=1e-5)


def test_the_gradient_to_the_pixels_is_that_of_finite_differences(reward, images):
    pixels = (floats(images) * 0.6 + 0.2).requires_grad_()  # away from the clamp
    reward.differentiable(pixels, prompts(images)).sum().backward()
    assert all(parameter.grad is None for parameter in [*reward.encoder.parameters(), *reward.head.parameters()])
    assert (pixels.grad.flatten(1).norm(dim=1) > 0).all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        step = 3e-3 * torch.randn(pixels.shape, generator=generator)
        with torch.no_grad():
            ahead, behind = (reward.differentiable(pixels + sign * step, prompts(images)) for sign in (1, -1))
        slopes = (pixels.grad * step).flatten(1).sum(1)
        torch.testing.assert_close((ahead - behind) / 2, slopes, rtol=0, atol=0.02 * slopes.abs().max().item())


def test_the_callers_autocast_changes_nothing(reward, images):
    plain = reward.differentiable(floats(images), prompts(images))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(reward.differentiable(floats(images), prompts(images)), plain, rtol=0, atol=1e-6)


def test_a_head_may_be_an_address(folder, images, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fetched = loaded(folder, "v2.5", head=(folder / "v2.5.pth").as_uri())
    assert list(tmp_path.rglob("v2.5.pth"))
    same = loaded(folder, "v2.5").score(images, prompts(images)).values
    np.testing.assert_array_equal(fetched.score(images, prompts(images)).values, same)


def test_a_head_may_be_a_file_at_the_hub(folder, images, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "models--trl-lib--ddpo-aesthetic-predictor"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "aesthetic-model.pth").symlink_to(folder / "v1.pth")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    fetched = loaded(folder, "v1", head="trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth")
    same = loaded(folder, "v1").score(images, prompts(images)).values
    np.testing.assert_array_equal(fetched.score(images, prompts(images)).values, same)


def test_the_default_is_the_published_v2_5():
    assert Aesthetic.Config().version == "v2.5"
    assert VERSIONS["v2.5"].encoder == "google/siglip-so400m-patch14-384"
    assert VERSIONS["v1"].encoder == "openai/clip-vit-large-patch14"


def test_a_run_can_ask_for_it_and_any_prompt_will_do(folder, images):
    config = REWARDS["aesthetic"].Config(version="v1", encoder=str(folder / "v1"), head=str(folder / "v1.pth"))
    scores = RewardWorker({"beauty": config}).score(images, prompts(images))
    assert scores.failures == {} and scores.valid["beauty"].all()
    assert judges("aesthetic", Prompt(0, "a cat"))


def test_what_cannot_be_loaded_is_one_sentence(folder, tmp_path):
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    torch.save({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "small.pth")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    torch.save({}, tmp_path / "empty.pth")
    heads = [str(path) for path in tmp_path.iterdir()]
    heads += [str(tmp_path / "no.pth"), "nobody/nothing/no.pth", "file:///no/such.pth", str(folder / "v2.5.pth")]
    wrong = [{"head": head} for head in heads] + [{"encoder": str(tmp_path)}, {"encoder": "nobody/nothing"}]
    for settings in wrong:
        with pytest.raises(UserError, match="aesthetic v1 cannot load the encoder .* with the head") as caught:
            loaded(folder, "v1", **settings)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("version", "other"), [("v1", "v2.5"), ("v2.5", "v1")])
def test_the_other_versions_encoder_is_refused_and_not_drawn_at_random(folder, version, other):
    with pytest.raises(UserError, match=f"aesthetic {version} cannot load"):
        loaded(folder, version, encoder=str(folder / other))


def test_an_encoder_with_weights_missing_is_refused(folder, tmp_path):
    from transformers import CLIPTextModelWithProjection

    CLIPTextModelWithProjection.from_pretrained(folder / "v1").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "v1" / "config.json").read_text())
    with pytest.raises(UserError, match="weights are missing"):
        loaded(folder, "v1", encoder=str(tmp_path))
