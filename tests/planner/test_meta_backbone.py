"""Networks without weights against the published numbers of parameters."""

import pytest
import torch

from align_cluster.backbones import BACKBONES
from align_cluster.errors import UserError
from align_cluster.planner import meta_backbone as planner
from align_cluster.planner.meta_backbone import built_parameters, meta_backbone, text_parameters

# Millions of parameters: of the denoiser with its fixed position table, which some published numbers include; of the
# denoiser without it; of each text encoder. Published: 2.5 B and 8.1 B (Stability AI), 12 B (Black Forest Labs), 860 M
# and 123 M (Stable Diffusion), 20 B and 7 B + vision (Qwen); T5-v1.1-XXL's encoder has 4.76 B, CLIP-L's 123 M, CLIP-G's
# 695 M.
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


def test_published_pipelines_have_the_published_numbers_of_parameters():
    assert PUBLISHED.keys() == planner.PUBLISHED.keys(), "every file is checked"
    for path, (kind, whole, own, texts) in PUBLISHED.items():
        backbone = meta_backbone(BACKBONES[kind].Config(path=path, height=512, width=512), "cuda")
        denoiser = backbone.load_denoiser()
        assert millions(denoiser.parameters()) == own, path
        assert millions(denoiser.parameters(), denoiser.buffers()) == whole, path
        known = text_parameters(backbone)
        assert [round(count / 1e6) for count in known.values()] == texts, path
        assert known == {name: built_parameters(backbone, name) for name in known}, path
        assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}
        assert backbone.latent_shape == ((4 if kind == "sd1" else 16), 64, 64), path


def test_a_run_without_t5_has_no_t5():
    config = BACKBONES["sd3"].Config(path="stabilityai/stable-diffusion-3.5-medium", t5=False)
    assert list(text_parameters(meta_backbone(config, "cuda"))) == ["text_encoder", "text_encoder_2"]


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_folder_needs_no_weights(kind, tiny_pipeline, tmp_path):
    for path in tiny_pipeline(kind).glob("**/*.json"):
        target = tmp_path / path.relative_to(tiny_pipeline(kind))
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    real = BACKBONES[kind](BACKBONES[kind].Config(path=str(tiny_pipeline(kind)), precision="fp32"))
    bare = meta_backbone(BACKBONES[kind].Config(path=str(tmp_path)), "cpu")
    assert millions(real.load_denoiser().parameters()) == millions(bare.load_denoiser().parameters())
    for name, count in text_parameters(bare).items():
        assert count == sum(parameter.numel() for parameter in getattr(real._text, name).parameters())


def test_an_unknown_hub_id_out_of_reach_is_one_sentence():
    with pytest.raises(UserError, match="'nobody/nothing' has no readable 'model_index.json'"):
        meta_backbone(BACKBONES["sd3"].Config(path="nobody/nothing"), "cpu").load_denoiser()
