"""What a sampler, a learner and a reward promise on one device: on a CPU in all runs of the tests, on a card with
`pytest -m gpu`. test_backbones.py has more of it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from align_cluster.config.plan import derive
from align_cluster.loop.advantages import AdvantageEstimator
from align_cluster.loop.requests import plan_chunks, training_request
from align_cluster.prompts import PROMPTS

from ..cases import CUDA, SLOW_DEVICES
from ..inprocess import Workers, own_environment

ROOT = Path(__file__).parents[2]
STAGES = [("cpu", 2), *(pytest.param("cuda", stage, marks=pytest.mark.gpu) for stage in range(4))]


@pytest.mark.parametrize(("device", "stage"), STAGES)
def test_a_nan_in_one_image_costs_one_update_and_no_more(tiny, device, stage):
    with own_environment():
        workers = Workers(tiny("grpo", f"learner.zero_stage={stage}"), device)
        config = workers.config
        prompts = PROMPTS[config.prompts.kind](config.prompts).load()
        drawn = workers.draw(plan_chunks(config, prompts, 0), training_request(config, 0, 0))
        credit = AdvantageEstimator(config).assign(drawn, None)
        backend = torch.distributed.get_backend()
        assert backend == {"cpu": "gloo", "cuda": "nccl"}[device]
        assert workers.update(0, drawn, credit)["skipped"].mean == 0
        held = workers.publish("behaviour").manifest.checksum

        before = drawn[0].record.before.copy()
        before[0, 0, 0, 0, 0] = np.nan
        spoiled = [replace(drawn[0], record=replace(drawn[0].record, before=before)), *drawn[1:]]
        assert workers.update(1, spoiled, credit)["skipped"].mean == 1
        assert workers.publish("behaviour").manifest.checksum == held

        assert workers.update(2, drawn, credit)["skipped"].mean == 0
        assert workers.publish("behaviour").manifest.checksum != held


@pytest.mark.parametrize("device", SLOW_DEVICES)
def test_every_zero_stage_ends_in_the_same_lora(tiny, in_process, device):
    loras = []
    for stage in range(4):
        done = in_process(tiny("grpo", "cluster.learners=1", f"learner.zero_stage={stage}"), device)
        assert done.self_check["max_abs_log_ratio"] < 1e-5
        loras.append(np.concatenate([value.ravel() for _, value in sorted(load_file(done.lora).items())]))
    for lora in loras[1:]:
        assert np.linalg.norm(lora - loras[0]) < 0.05 * np.linalg.norm(loras[0])


@pytest.mark.parametrize("device", SLOW_DEVICES)
def test_two_samplers_on_one_device_draw_a_chunk_bit_by_bit_alike(tiny, device):
    workers = [Workers(tiny("grpo", "backbone.precision=bf16"), device) for _ in range(2)]
    config = workers[0].config
    prompts = PROMPTS[config.prompts.kind](config.prompts).load()
    first, second = (one.draw(plan_chunks(config, prompts, 0), training_request(config, 0, 0)) for one in workers)
    for ours, theirs in zip(first, second, strict=True):
        assert np.array_equal(ours.images, theirs.images)
        for name in ("x0", "before", "after", "log_probs"):
            assert np.array_equal(getattr(ours.record, name), getattr(theirs.record, name))


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.exhaustive), CUDA])
def test_a_reward_worker_shares_the_device_with_training(tiny, tmp_path, device):
    overrides = ["rewards.clip.pool.workers=1", f"rewards.clip.pool.gpus={0.2 if device == 'cuda' else 0}"]
    pools = derive(tiny("nft", *overrides), 8, 1 if device == "cuda" else 0).reward_pools
    assert [pool.beside for pool in pools if pool.name == "clip"] == [device == "cuda"]
    command = [sys.executable, "-m", "align_cluster.cli", "train", "tests/system/tiny.yaml", "--out", str(tmp_path)]
    given = [word for override in overrides for word in ("--set", override)]
    done = subprocess.run([*command, *given], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["workers_lost"] == 0 and 0 < summary["after"]["overall"]["reward/clip"] < 1
