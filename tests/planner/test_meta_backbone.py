"""Networks without weights against the published numbers of parameters."""

import pytest
import torch
import transformers

from align_cluster.backbones import BACKBONES
from align_cluster.errors import UserError
from align_cluster.planner.meta_backbone import shell, text_encoders
from align_cluster.planner.published import PIPELINES
from align_cluster.planner.rewards import MODELS, models
from align_cluster.rewards import REWARDS

# In millions: the denoiser with its fixed position table, where the published number has that; the denoiser's own; its
# text encoders'. Published: 2.5 B and 8.1 B (Stability AI), 12 B (Black Forest Labs), 860 M and 123 M (Stable
# Diffusion), 20 B and 7 B + vision (Qwen); T5-v1.1-XXL's encoder has 4.76 B, CLIP-L's 123 M, CLIP-G's 695 M.
PUBLISHED = {
    "stabilityai/stable-diffusion-3.5-medium": ("sd3", 2470, 2243, [124, 695, 4762]),
    "stabilityai/stable-diffusion-3.5-large": ("sd3", 8146, 8057, [124, 695, 4762]),
    "black-forest-labs/FLUX.1-dev": ("flux", 11901, 11901, [123, 4762]),
    "black-forest-labs/FLUX.1-schnell": ("flux", 11891, 11891, [123, 4762]),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd1", 860, 860, [123]),
    "CompVis/stable-diffusion-v1-4": ("sd1", 860, 860, [123]),
    "Qwen/Qwen-Image": ("qwen_image", 20430, 20430, [8292]),
}


def millions(*groups):
    return round(sum(tensor.numel() for group in groups for tensor in group) / 1e6)


def test_every_published_pipeline_is_checked():
    assert PUBLISHED.keys() == PIPELINES.keys()


@pytest.mark.parametrize("path", PUBLISHED)
def test_published_pipelines_have_the_published_numbers_of_parameters(path):
    kind, whole, own, texts = PUBLISHED[path]
    backbone = shell(BACKBONES[kind].Config(path=path, height=512, width=512), "cuda")
    denoiser = backbone.load_denoiser()
    assert millions(denoiser.parameters()) == own and millions(denoiser.parameters(), denoiser.buffers()) == whole
    assert [millions(encoder.parameters()) for encoder in text_encoders(backbone).values()] == texts
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}
    assert backbone.latent_shape == ((4 if kind == "sd1" else 16), 64, 64)


def test_a_run_without_t5_has_no_t5():
    config = BACKBONES["sd3"].Config(path="stabilityai/stable-diffusion-3.5-medium", t5=False)
    assert list(text_encoders(shell(config, "cuda"))) == ["text_encoder", "text_encoder_2"]


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_folder_needs_no_weights(kind, tiny_pipeline, tmp_path):
    for path in tiny_pipeline(kind).glob("**/*.json"):
        target = tmp_path / path.relative_to(tiny_pipeline(kind))
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    real = BACKBONES[kind](BACKBONES[kind].Config(path=str(tiny_pipeline(kind)), precision="fp32"))
    bare = shell(BACKBONES[kind].Config(path=str(tmp_path)), "cpu")
    assert millions(real.load_denoiser().parameters()) == millions(bare.load_denoiser().parameters())
    loaded = {name: getattr(real._text, name) for name in text_encoders(bare)}
    for name, encoder in text_encoders(bare).items():
        assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in loaded[name].parameters())


def test_an_unknown_hub_id_out_of_reach_is_one_sentence():
    with pytest.raises(UserError, match="'nobody/nothing' has no readable 'model_index.json'"):
        shell(BACKBONES["sd3"].Config(path="nobody/nothing"), "cpu").load_denoiser()


def test_reward_models_have_the_sizes_of_their_architectures():
    heads = {"num_attention_heads": 16, "patch_size": 14}
    towers = {
        "openai/clip-vit-large-patch14": transformers.CLIPConfig(
            vision_config={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, **heads},
            text_config={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
            projection_dim=768,
        ),
        "yuvalkirstain/PickScore_v1": transformers.CLIPConfig(
            vision_config={"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, **heads},
            text_config={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
            projection_dim=1024,
        ),
    }
    for name, config in towers.items():
        with torch.device("meta"):
            model = transformers.CLIPModel(config)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(MODELS[name].parameters, rel=1e-3)


@pytest.mark.parametrize("kind", REWARDS)
def test_the_models_of_every_reward_by_default_are_known(kind):
    found = models(REWARDS[kind].Config(**({"url": "http://h:1", "reward": "x"} if kind == "http" else {})))
    assert found and None not in found
    assert (sum(model.parameters for model in found) == 0) == (kind in ("geneval", "http", "jpeg", "ocr"))


def test_the_models_of_detectors_for_photographs_are_a_detector_and_a_clip():
    reward = REWARDS["geneval"].Config(detector="mask2former")
    assert [round(model.parameters / 1e6) for model in models(reward)] == [69, 428]
    assert models(REWARDS["pickscore"].Config(path="nobody/nothing")) == [None]
