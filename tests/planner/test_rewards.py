"""Sizes of reward models against their architectures."""

import pytest
import torch
import transformers

from align_cluster.rewards import REWARDS
from align_cluster.rewards.clip import CLIPS


def sizes(kind, **settings):
    return REWARDS[kind](REWARDS[kind].Config(**settings)).model_sizes()


def test_clips_have_the_sizes_of_their_architectures():
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
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(CLIPS[name].parameters, rel=1e-3)


def test_every_reward_knows_the_sizes_of_its_default_models():
    for kind in REWARDS:
        found = sizes(kind, **({"url": "http://h:1", "reward": "x"} if kind == "http" else {}))
        assert None not in found, kind
        assert (sum(model.parameters for model in found) == 0) == (kind in ("geneval", "http", "jpeg", "ocr")), kind


def test_settings_choose_the_models(tmp_path):
    found = sizes("geneval", detector="mask2former")
    assert [round(model.parameters / 1e6) for model in found] == [69, 428], "a detector and a CLIP that names colours"
    assert sizes("sgp", of={"kind": "clip_score", "path": "openai/clip-vit-large-patch14"}) == [found[1]]
    (tmp_path / "model.safetensors").write_bytes(bytes(4096))
    assert [model.parameters for model in sizes("pickscore", path=str(tmp_path))] == [1024], "a folder's files in fp32"
    assert sizes("pickscore", path="nobody/nothing") == [None]
