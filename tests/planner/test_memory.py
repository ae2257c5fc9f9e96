"""What is predicted without weights against what real workers hold."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align_cluster.config.plan import Plan, derive, settle
from align_cluster.config.run import RunConfig
from align_cluster.planner.fit import learner_memory, sampler_memory
from align_cluster.planner.memory import measure

SCRIPT = Path(__file__).with_name("measured.py")
# Of these networks weights, optimiser and activations all weigh something.
SMALL = {"sample_size": 16, "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 4}
LARGE = {"sample_size": 64, "num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 8}


def pipeline(tiny: Path, folder: Path, sizes: dict[str, int]) -> Path:
    """A copy of a tiny pipeline of Stable Diffusion 3.5 with a larger network."""
    from diffusers import SD3Transformer2DModel

    shutil.copytree(tiny, folder)
    config = SD3Transformer2DModel.load_config(folder, subfolder="transformer") | sizes
    config |= {
        "caption_projection_dim": sizes["num_attention_heads"] * sizes["attention_head_dim"],
        "pos_embed_max_size": sizes["sample_size"],
    }
    SD3Transformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    return folder


def run(
    path: Path, stage: int, guidance: float = 1.0, precision: str = "fp32", size: int = 8, **settings: object
) -> RunConfig:
    """DiffusionNFT in groups and chunks of `size`, with other settings of the learner; or another `algorithm`."""
    algorithm = settings.pop("algorithm", {"kind": "nft", "timesteps": 2})
    backbone = {"kind": "sd3", "path": str(path), "text": "free", "lora": {"rank": 64}, "precision": precision}
    changes = {"zero_stage": stage} | settings
    config = RunConfig.model_validate(
        {
            "name": "memory",
            "steps": 1,
            "prompts_per_step": 2,
            "backbone": backbone,
            "prompts": {"kind": "embedded"},
            "rollout": {"group_size": size, "steps": 2, "guidance": guidance, "chunk": size},
            "rewards": {"geneval": {"kind": "geneval"}},
            "algorithm": algorithm,
            "learner": changes,
            "evaluate": {"prompts": {"kind": "embedded", "split": "held_out"}},
        }
    )
    return settle(config, 1, 0)


def held(configs: list[RunConfig], world: int, out: Path, device: str = "cpu") -> list[dict[str, int]]:
    """What real workers held, for each run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    runs = [config.model_dump_json() for config in configs]
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), port, str(out), device, *runs], env=environment)
        for rank in range(world)
    ]
    try:
        assert [rank.wait(timeout=500) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
    return json.loads(out.read_text())


def predicted(config: RunConfig, world: int, device: str = "cpu") -> dict[str, float]:
    plan: Plan = derive(config, world, 1 if device == "cuda" else 0)
    assert plan.learners == world
    sizes = measure(config, plan, device)
    roles = {"learner": learner_memory, "sampler": sampler_memory}
    return {name: role(config, plan, sizes).total for name, role in roles.items()}


@pytest.fixture(scope="module")
def folder(tiny_pipeline, tmp_path_factory):
    return pipeline(tiny_pipeline("sd3"), tmp_path_factory.mktemp("memory") / "pipeline", SMALL)


@pytest.mark.exhaustive
def test_real_workers_hold_what_was_predicted(folder, tmp_path):
    configs = [
        run(folder, 0, precision="fp32", micro_batch=4, fold=1),
        run(folder, 2, 3.0, precision="fp32", gradient_checkpointing=True),
        run(folder, 1, 3.0, precision="bf16", guidance_gradient="both", ema=0.0),
    ]
    found = held(configs, 1, tmp_path / "held.json")
    assert [config.learner.fold for config in configs] == [1, 2, 2]
    for config, real in zip(configs, found, strict=True):
        assert predicted(config, 1) == pytest.approx(real, rel=0.05), config.learner


@pytest.mark.exhaustive
def test_a_critic_takes_beside_the_actor_what_was_predicted(folder, tmp_path):
    critics = [{"features": name, "width": 64, "heads": 4} for name in ("lora", "copy", "whole", "pixels")]
    kinds = [{"kind": "ppo", "critic": critic, "critic_batch": 8} for critic in critics]
    kinds.append(kinds[0] | {"critic_batch": 24})  # three micro-batches, more than the actor's update takes
    configs = [run(folder, 2, algorithm=kind) for kind in ({"kind": "grpo"}, *kinds)]
    actor, *critics = (one["learner"] for one in held(configs, 1, tmp_path / "held.json"))
    foreseen, *more = (predicted(config, 1)["learner"] for config in configs)
    assert [foreseen, *more] == pytest.approx([actor, *critics], rel=0.05)
    added = pytest.approx([one - actor for one in critics[:4]], abs=0.03 * actor)
    assert [one - foreseen for one in more[:4]] == added and more[4] > more[0]


@pytest.mark.exhaustive
def test_two_ranks_share_what_was_predicted(folder, tmp_path):
    config = run(folder, 2, precision="fp32")
    (real,) = held([config], 2, tmp_path / "held.json")
    assert predicted(config, 2)["learner"] == pytest.approx(real["learner"], rel=0.05)


@pytest.mark.gpu
def test_a_gpu_holds_what_was_predicted(tiny_pipeline, tmp_path):
    large = pipeline(tiny_pipeline("sd3"), tmp_path / "pipeline", LARGE)
    configs = [
        run(large, 0, precision="bf16"),
        run(large, 2, 3.0, precision="bf16", gradient_checkpointing=True, size=16),
    ]
    found = held(configs, 1, tmp_path / "held.json", "cuda")
    for config, real in zip(configs, found, strict=True):
        assert predicted(config, 1, "cuda") == pytest.approx(real, rel=0.1), torch.cuda.get_device_name()
