"""A network of equal layers is counted by a few of them, to the same numbers."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from align_cluster.config.load import load
from align_cluster.config.plan import Rows, derive
from align_cluster.planner import layers
from align_cluster.planner.layers import Layers
from align_cluster.planner.memory import Sizes, measure

from .test_runs import job as job  # a fixture

CONFIGS = Path(__file__).parents[2] / "configs"


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [4] * 5 + [8] * 2 + [4] * 6
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(width, width) for width in widths)
        self.others = torch.nn.ModuleList(torch.nn.ReLU() for _ in range(7))


def parameters(network: Network) -> list[int]:
    return [sum(parameter.numel() for parameter in network.parameters()), len(network.blocks), len(network.others)]


def test_a_shortened_network_tells_the_numbers_of_the_whole_one():
    network = Network()
    whole = parameters(network)
    found = Layers(network)
    assert [layer.in_features for layer in network.blocks] == [4, 4, 4, 8, 8, 4, 4, 4] and len(network.others) == 3
    assert found.whole(lambda: parameters(network)) == whole
    assert len(network.blocks) == 8, "what is counted leaves it as it was"


def test_layers_that_differ_in_a_setting_without_weights_are_not_equal():
    network = torch.nn.ModuleList(torch.nn.Dropout(0.1 * place) for place in range(8))
    Layers(network)
    assert len(network) == 8


@pytest.mark.slow
def test_a_run_takes_what_it_takes_with_all_its_layers(job, tiny_pipeline, tmp_path, monkeypatch):
    shutil.copytree(tiny_pipeline("flux"), tmp_path, dirs_exist_ok=True)
    settings = tmp_path / "transformer" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"num_layers": 4, "num_single_layers": 5}))
    config = job("flux", "nft", f"backbone.path={tmp_path}", "learner.gradient_checkpointing=true")
    plan = derive(config, 2, 0, Rows(2, 2))
    shortened = measure(plan.config, plan, "cuda", alternatives=False)
    monkeypatch.setattr(layers, "KEPT", 100)
    assert measure(plan.config, plan, "cuda", alternatives=False) == shortened


@pytest.mark.exhaustive
def test_published_pipelines_take_what_they_take_with_all_their_layers(monkeypatch):
    for name in ("sd35_medium_nft", "flux_dev_grpo", "qwen_image_grpo"):
        plan = derive(load(CONFIGS / f"{name}.yaml"), 16, 8, Rows(8, 8))
        with monkeypatch.context() as patch:
            shortened = flatten(measure(plan.config, plan, "cuda"))
            patch.setattr(layers, "KEPT", 100)
            assert flatten(measure(plan.config, plan, "cuda")) == pytest.approx(shortened, rel=0.02), name


def flatten(sizes: Sizes) -> list[float]:
    return [float(leaf) for leaf in tree_leaves(asdict(sizes))]
