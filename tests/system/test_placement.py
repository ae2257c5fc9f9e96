"""A run gets all that it needs or ends within seconds: what is missing is named, and nothing is left behind."""

import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

from align_cluster.cluster.placement import reserve, slots
from align_cluster.config.plan import Plan, derive
from align_cluster.errors import UserError
from align_cluster.loop import driver


@pytest.fixture
def plan(tiny):
    """Function (cores, gpus, *overrides) -> Plan of the tiny job."""
    return lambda cores, gpus, *overrides: derive(tiny("nft", *overrides), cores, gpus)


def reserved(bundles: list[dict], places: dict[str, list[int]], plan: Plan) -> bool:
    """Whether every bundle holds what its workers ask for."""
    asked = [{"CPU": 0.0, "GPU": 0.0} for _ in bundles]
    shares = {
        "sampler": (plan.sampler_cpus, plan.sampler_gpus),
        "learner": (plan.learner_cpus, plan.learner_gpus),
    } | {f"reward {pool.name}": (pool.cpus, pool.gpus) for pool in plan.reward_pools}
    for role, indices in places.items():
        for index in indices:
            for key, share in zip(("CPU", "GPU"), shares[role], strict=True):
                asked[index][key] += share
    return all(
        bundle.get(key, 0) >= need[key] - 1e-4 for bundle, need in zip(bundles, asked, strict=True) for key in need
    )


@pytest.mark.parametrize(
    ("cores", "gpus", "overrides"),
    [
        (2, 0, ()),
        (1, 0, ()),
        (16, 0, ("cluster.samplers=1", "cluster.reward_workers=3")),
        (8, 1, ()),
        (2, 0, ("loop.ahead=1",)),
        (2, 0, ("loop.ahead=1", "cluster.samplers=3", "cluster.learners=1")),
        (64, 8, ("prompts_per_step=16", "loop.ahead=1")),
        (64, 4, ("loop.ahead=1", "rewards.clip.pool.workers=3", "rewards.clip.pool.gpus=0.3")),
        (64, 8, ("prompts_per_step=16",)),
        (64, 8, ("prompts_per_step=16", "cluster.samplers=6", "cluster.learners=2")),
        (64, 4, ("prompts_per_step=16", "cluster.samplers=8")),
        (64, 3, ("prompts_per_step=16", "cluster.samplers=1", "cluster.learners=3")),
        (16, 0, ("rewards.clip.pool.workers=2", "rewards.geneval.pool.cpus=0.5")),
        (64, 3, ("prompts_per_step=16", "rewards.clip.pool.workers=2", "rewards.clip.pool.gpus=0.5")),
        (8, 1, ("rewards.clip.pool.workers=2", "rewards.clip.pool.gpus=0.2")),
        (8, 1, ("cluster.samplers=3", "rewards.clip.pool.workers=3", "rewards.clip.pool.gpus=0.1")),
        (64, 4, ("prompts_per_step=16", "rewards.clip.pool.workers=6", "rewards.clip.pool.gpus=0.2")),
        (
            64,
            3,
            ("cluster.samplers=1", "cluster.learners=3", "rewards.clip.pool.workers=3", "rewards.clip.pool.gpus=0.3"),
        ),
        (
            64,
            4,
            ("cluster.samplers=2", "cluster.learners=2", "rewards.clip.pool.workers=3", "rewards.clip.pool.gpus=0.4"),
        ),
        (64, 2, ("rewards.clip.pool.gpus=0.4", "rewards.geneval.pool.gpus=0.3")),
    ],
)
def test_every_worker_has_room_and_every_learner_rank_a_gpu_of_its_own(plan, cores, gpus, overrides):
    made = plan(cores, gpus, *overrides)
    bundles, places = slots(made)
    assert [len(indices) for indices in places.values()] == [
        *(made.samplers, made.learners, *(pool.workers for pool in made.reward_pools))
    ]
    assert reserved(bundles, places, made)
    assert sum(bundle["CPU"] for bundle in bundles) <= cores + 1e-6
    assert sum(bundle.get("GPU", 0) for bundle in bundles) <= gpus
    assert len(set(places["learner"])) == made.learners
    if gpus:
        assert all(bundles[index]["GPU"] == 1 for index in places["learner"])


def test_a_run_on_a_cluster_without_the_resources_fails_at_once_and_leaves_no_folder(
    tiny, local_ray, monkeypatch, tmp_path
):
    monkeypatch.setattr(driver, "resources", lambda _: (64, 2))  # what the plan is made for; the Ray here has 2 cores
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^the cluster lacks \d CPU \(2 in all.* and 2 GPU \(0 in all.*2 learners"):
        driver.train(tiny("nft"), tmp_path)
    assert time.monotonic() - began < 5
    assert not list(tmp_path.iterdir())


def test_a_run_on_a_busy_cluster_fails_within_seconds(tiny, plan, local_ray, tmp_path):
    with reserve(plan(2, 0)):
        began = time.monotonic()
        with pytest.raises(UserError, match=r"^the cluster lacks 1.9 CPU \(2 in all, 0.1 free\)"):
            driver.train(tiny("nft"), tmp_path)
        assert time.monotonic() - began < 10
    assert not list(tmp_path.iterdir())
    with reserve(plan(2, 0)) as places:  # given back, it can be had again
        assert len(places["sampler"]) == 2


def test_samplers_that_may_come_later_are_not_asked_for_at_the_start(plan, local_ray):
    made = plan(2, 0, "prompts_per_step=8", "rollout.chunk=4", "cluster.samplers=1", "cluster.max_samplers=6")
    assert (made.samplers, made.most_samplers) == (1, 6)
    with reserve(made) as places:
        assert len(places["sampler"]) == 1
    assert plan(2, 0, "cluster.max_samplers=6").most_samplers == 2  # a step has no more chunks


@pytest.mark.slow
def test_ray_puts_each_learner_rank_on_another_gpu_than_the_next_and_rewards_beside_them(tmp_path):
    done = subprocess.run([sys.executable, "-c", TWO_GPUS], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.split() == ["[0,", "1]"] * 3, done.stderr


ROOT = Path(__file__).parents[2]
# Two pretended GPUs need a Ray of their own. The placement is Ray's; only the devices are not there.
TWO_GPUS = """
import tempfile
from align_cluster.cluster.placement import reserve
from align_cluster.config.load import load
from align_cluster.config.plan import derive
import ray
with tempfile.TemporaryDirectory(prefix="ac-", dir="/tmp", ignore_cleanup_errors=True) as folder:
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
             object_store_memory=100_000_000)
    plan = derive(load("tests/system/tiny.yaml", ["rewards.clip.pool.workers=2", "rewards.clip.pool.gpus=0.2"]), 4, 2)
    gpu = ray.remote(lambda: ray.get_gpu_ids()[0])
    with reserve(plan) as places:
        for role, share in (("sampler", plan.sampler_gpus), ("learner", plan.learner_gpus), ("reward clip", 0.2)):
            options = [{"num_cpus": 0.1, "num_gpus": share, "scheduling_strategy": place} for place in places[role]]
            print(ray.get([gpu.options(**each).remote() for each in options]))
    ray.shutdown()
"""


def test_what_a_plan_asks_for_fits_on_nodes_of_one_core_each(plan):
    """However many workers are stated: a core has whole ones."""
    for cores, samplers, learners, ahead in product((2, 3), (1, 2, 3, 5), (1, 2), (0, 1)):
        counts = (f"cluster.samplers={samplers}", f"cluster.learners={learners}", f"loop.ahead={ahead}")
        bundles, _ = slots(plan(cores, 0, *counts))
        nodes = [1.0] * cores
        for need in sorted((bundle["CPU"] for bundle in bundles), reverse=True):
            node = next((index for index, left in enumerate(nodes) if left >= need - 1e-6), None)
            assert node is not None, (cores, counts, bundles)
            nodes[node] -= need
