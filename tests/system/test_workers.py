"""Sampler actors: the same chunk comes out of any of them, with the weights that were asked for or not at all."""

import os
import signal
import time

import numpy as np
import pytest

from align_cluster.backbones.adapters import adapter_parameters
from align_cluster.cluster.actors import RemoteSampler
from align_cluster.cluster.pool import Pool, stream
from align_cluster.prompts.groups import plan_step
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.rollouts.steps import Dpm2, FlowSde
from align_cluster.rollouts.windows import Window
from align_cluster.types import Condition, Prompt
from align_cluster.weights import check, publish

PROMPTS = [Prompt(0, "a photo of a red circle"), Prompt(1, "a photo of two blue squares")]
CHUNKS = plan_step(PROMPTS, seed=0, step=0, prompts_per_step=2, group_size=4, chunk=4)
SDE = DrawRequest(1, 4, FlowSde.Config(), window=Window((0, 1, 2, 3), (0, 2), 2))
ODE = DrawRequest(1, 4, Dpm2.Config())


@pytest.fixture(scope="module")
def pool(local_ray, tiny):
    """Two samplers that hold version 1: a LoRA with random numbers."""
    backbone = tiny("grpo").backbone
    actor = local_ray.remote(RemoteSampler).options(num_cpus=0.5)
    pool = Pool("sampler", lambda name, index: actor.remote(backbone, 1, name), 2, timeout_s=120)
    rng = np.random.default_rng(0)
    shapes = {name: p.shape for name, p in adapter_parameters(Sampler(backbone).denoiser, "default").items()}
    state = {name: 0.1 * rng.standard_normal(tuple(shape), dtype=np.float32) for name, shape in shapes.items()}
    pool.manifest, buffer = publish(state, version=1)
    pool.wait_until(lambda: len(pool.ready_workers) == pool.size)
    check(pool.manifest, pool.broadcast("adopt", pool.manifest, local_ray.put(buffer)), expected=2)
    yield pool
    pool.shutdown()


@pytest.fixture(scope="module")
def conditions(local_ray, pool) -> list[Condition]:
    return local_ray.get(pool.workers[0].actor.encode.remote([prompt.text for prompt in PROMPTS]))


def draw(ray, pool: Pool, worker: int, group: int, conditions: list[Condition], request: DrawRequest) -> tuple:
    return ray.get(pool.workers[worker].actor.draw_chunk.remote(CHUNKS[group], None, request, conditions[group]))


@pytest.mark.parametrize("request_", [SDE, ODE], ids=["flow_sde", "dpm2"])
def test_two_workers_draw_the_same_chunk_bit_by_bit(local_ray, pool, conditions, request_):
    draw(local_ray, pool, 1, 1, conditions, request_)  # what a worker drew before leaves no trace
    (info, images, record), (other_info, other_images, other) = (
        draw(local_ray, pool, worker, 0, conditions, request_) for worker in (0, 1)
    )
    assert info.fingerprint == other_info.fingerprint
    np.testing.assert_array_equal(images, other_images)
    assert images.std() > 0
    for name in ("x0", "sigmas", "indices", "before", "after", "log_probs"):
        mine, theirs = getattr(record, name), getattr(other, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.tobytes() == theirs.tobytes(), name


def test_stale_weights_are_refused_at_once_with_the_samplers_own_error(pool, conditions):
    stale = DrawRequest(7, 4, Dpm2.Config())
    began = time.monotonic()
    pool.submit(0, "draw_chunk", CHUNKS[0], None, stale, conditions[0], returns=3)
    with pytest.raises(RuntimeError, match=r"sampler-0 holds weights 1, but was asked to draw with 7"):
        list(stream(pool))
    assert time.monotonic() - began < 30
    pool.workers[0].calls.clear()


def test_weights_that_do_not_fit_are_refused_by_name(local_ray, pool):
    good = pool.broadcast_state[1]
    manifest, buffer = publish({"blocks.9.lora_A.weight": np.ones((2, 2), np.float32)}, version=2)
    with pytest.raises(RuntimeError, match=r"weights 2 do not fit: .*blocks\.9\.lora_A\.weight"):
        pool.broadcast("adopt", manifest, local_ray.put(buffer))
    pool.broadcast("adopt", *good)


def test_the_successor_of_a_killed_sampler_draws_with_the_current_weights(local_ray, pool, conditions, pid_of):
    _, images, _ = draw(local_ray, pool, 1, 0, conditions, ODE)
    victim = pool.workers[0]
    os.kill(pid_of(victim.actor), signal.SIGKILL)
    for number in range(4):
        pool.submit(number, "draw_chunk", CHUNKS[0], None, ODE, conditions[0], returns=3)
    done = list(stream(pool))
    assert sorted(item.key for item in done) == [0, 1, 2, 3]
    assert victim not in pool.workers and pool.lost == 1
    for item in done:
        assert item.value.version == 1
        np.testing.assert_array_equal(local_ray.get(item.refs[0]), images)
    pool.wait_until(lambda: len(pool.ready_workers) == pool.size)
    receipts = pool.broadcast("adopt", *pool.broadcast_state[1])
    check(pool.manifest, receipts, expected=2)
    assert {receipt.worker for receipt in receipts} == {"sampler-2", "sampler-1"}
