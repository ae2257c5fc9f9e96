import math
from dataclasses import replace
from pathlib import Path

import pytest

from align_cluster.config.load import load
from align_cluster.config.plan import derive, table
from align_cluster.errors import UserError
from align_cluster.prompts.groups import plan_step
from align_cluster.types import Prompt

CONFIGS = Path(__file__).parents[2] / "configs"


def total_cpus(plan):
    shares = (
        (plan.sampler_cpus, plan.samplers),
        (plan.learner_cpus, plan.learners),
        *((pool.cpus, pool.workers) for pool in plan.reward_pools),
    )
    return sum(share * count for share, count in shares)


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("threads", [1, 2])
def test_on_cpus_the_shares_always_fit_the_cores(run_config, cores, workers, threads):
    config = run_config(f"cluster.reward_workers={workers}", f"cluster.threads={threads}", "prompts_per_step=32")
    plan = derive(config, cores, 0)
    assert total_cpus(plan) <= cores + 1e-9
    assert min(plan.sampler_cpus, plan.learner_cpus, plan.reward_pools[0].cpus) >= 1e-4
    assert plan.samplers * threads <= max(cores, threads) and plan.sampler_gpus == plan.learner_gpus == 0


def test_two_cores_get_one_sampler_and_one_learner_each(run_config):
    plan = derive(run_config(), 2, 0)
    assert (plan.samplers, plan.learners, plan.sampler_cpus, plan.learner_cpus) == (2, 2, 0.45, 0.45)
    assert [pool.cpus for pool in plan.reward_pools] == [pytest.approx(0.1)]


def test_every_gpu_gets_one_sampler_and_one_learner_that_share_it(run_config):
    plan = derive(run_config("prompts_per_step=48"), 64, 8)
    assert (plan.samplers, plan.learners, plan.sampler_gpus, plan.learner_gpus) == (8, 8, 0.5, 0.5)
    assert (plan.sampler_cpus, plan.learner_cpus, plan.reward_pools[0].cpus) == (1, 1, 1)


def test_stated_gpu_pools_that_fit_side_by_side_get_whole_gpus(run_config):
    plan = derive(run_config("cluster.samplers=5", "cluster.learners=3", "prompts_per_step=48"), 64, 8)
    assert (plan.sampler_gpus, plan.learner_gpus) == (1, 1)


def test_two_samplers_on_one_gpu_share_its_half(run_config):
    plan = derive(run_config("cluster.samplers=2"), 8, 1)
    assert (plan.samplers, plan.sampler_gpus, plan.learner_gpus) == (2, 0.25, 0.5)


def test_more_learners_than_gpus_are_refused(run_config):
    with pytest.raises(UserError, match="cluster.learners is 2 with 1 GPUs.*set it to 1"):
        derive(run_config("cluster.learners=2"), 8, 1)


def test_stated_counts_win_and_oversubscription_is_noted(run_config):
    plan = derive(run_config("cluster.samplers=4", "cluster.learners=1"), 2, 0)
    assert (plan.samplers, plan.learners) == (4, 1) and total_cpus(plan) <= 2
    assert any("share 2 cores" in note for note in plan.notes)


def test_no_more_workers_start_than_there_is_work(run_config):
    plan = derive(run_config("prompts_per_step=3"), 16, 0)
    assert (plan.samplers, plan.learners) == (3, 3)
    plan = derive(run_config("cluster.learners=9", "prompts_per_step=3", "learner.updates_per_step=3"), 16, 0)
    assert plan.learners == 1 and "cluster.learners is 9" in plan.notes[0]


def test_the_work_of_a_step_adds_up(run_config):
    config = run_config("rollout.chunk=3", "learner.micro_batch=2", "learner.updates_per_step=2", "rollout.guidance=4")
    plan = derive(config, 2, 0)
    assert plan.images_per_step == 4 * 6 and plan.chunks_per_step == 8 and plan.chunk == 3
    # Chunks of 3 in micro-batches of 2 are two pieces each: 8 pieces an update, shared by two ranks.
    assert plan.micro_batch == 2 and plan.micro_batches == math.ceil(8 / 2 * 2 / 2)
    assert plan.rollout_calls == 8 * 4 * 2, "chunks x steps x two branches of guidance"


def test_cutting_does_not_depend_on_the_machine(run_config):
    small, large = (derive(run_config(), cores, gpus) for cores, gpus in ((1, 0), (256, 32)))
    for field in ("chunk", "micro_batch", "images_per_step", "chunks_per_step", "updates_per_step", "inner_passes"):
        assert getattr(small, field) == getattr(large, field)


def test_the_table_says_everything_that_was_decided(run_config):
    plan = replace(derive(run_config(), 2, 0), notes=("something to know",))
    text = table(plan)
    for part in ("2 x 0.45 CPU", "24, in 4 chunks of 6", "note: something to know"):
        assert part in text


@pytest.mark.parametrize("chunk", [None, 1, 4, 8, 24])
def test_the_plan_of_an_exploring_run_counts_the_chunks_that_are_drawn(run_config, chunk):
    cut = [] if chunk is None else [f"rollout.chunk={chunk}"]
    config = run_config("exploration.conditions=4", *cut)
    plan = derive(config, 2, 0)
    prompts = [Prompt(i, f"p{i}") for i in range(9)]
    size = plan.chunk
    drawn = plan_step(prompts, 0, 0, config.prompts_per_step, config.rollout.group_size, size, config.conditions)
    assert size == (chunk or 6) and plan.chunks_per_step == len(drawn) == 4 * 24 / size
    assert plan.images_per_step == sum(len(part.seeds) for part in drawn) == 4 * 6 * 4
    assert all(len(part.seeds) == size for part in drawn)
    assert plan.rollout_calls == len(drawn) * 4 and plan.micro_batches * plan.learners >= len(drawn)


def test_one_condition_plans_like_no_exploration(run_config):
    assert derive(run_config("exploration.conditions=1"), 4, 0) == derive(run_config(), 4, 0)
    assert derive(run_config("exploration.conditions=3"), 4, 0) != derive(run_config(), 4, 0)


@pytest.mark.parametrize(
    ("window", "passes"),
    [
        ([], 5),  # 99 % of 6 steps, cut down
        (["kind=fraction", "fraction=1"], 5),  # the terminal step is never trained
        (["kind=fraction", "fraction=0.5"], 3),
        (["kind=fraction", "fraction=0.5", "choice=per_sample"], 2),  # half of the five that can be trained
        (["kind=fraction", "fraction=0.01"], 1),
        (["kind=sliding", "size=4"], 4),
        (["kind=sliding", "size=2", "strategy=random"], 2),
        (["kind=fast"], 2),
        (["kind=fast", "size=3", "range=[1, 5]"], 3),
    ],
)
def test_an_update_passes_over_a_sample_once_for_each_step_of_its_window(run_config, window, passes):
    changes = [f"rollout.window.{setting}" for setting in window]
    config = run_config("algorithm.kind=grpo", "rollout.steps=6", "rollout.guidance=2", *changes)
    plan = derive(config, 2, 0)
    assert plan.inner_passes == passes == max(config.window.plan(6, step, step).keep for step in range(200))
    assert plan.rollout_calls == 4 * 6 * 2, "a window changes what is trained, not how much is drawn"


def test_a_reward_with_a_pool_gets_workers_of_its_own_and_the_others_share(run_config):
    plan = derive(
        run_config("rewards.clip.kind=clip_score", "rewards.clip.pool.workers=2", "rewards.clip.pool.cpus=1.5"), 16, 0
    )
    shared, own = plan.reward_pools
    assert (shared.rewards, own.rewards, own.name) == (("judge",), ("clip",), "clip")
    assert (own.workers, own.cpus, own.gpus, plan.reward_workers) == (2, 1.5, 0.0, 3)
    assert total_cpus(plan) <= 16


def pool(workers, gpus, reward="judge"):
    return f"rewards.{reward}.pool.workers={workers}", f"rewards.{reward}.pool.gpus={gpus}"


def test_reward_workers_that_ask_for_half_a_gpu_or_more_have_gpus_of_their_own(run_config):
    plan = derive(run_config(*pool(2, 0.5), "prompts_per_step=48"), 64, 8)
    assert (plan.samplers, plan.learners, plan.gpus) == (7, 7, 7) and not plan.reward_pools[0].beside
    with pytest.raises(UserError, match="rewards ask for 1 GPUs in their pools, and there are 1.*less than 0.5 share"):
        derive(run_config(*pool(2, 0.5)), 64, 1)
    with pytest.raises(UserError, match="rewards ask for 0.2 GPUs in their pools, and there are 0"):
        derive(run_config(*pool(1, 0.2)), 64, 0)
    with pytest.raises(UserError, match="rewards ask for 0.5 GPUs in their pools, and there are 1"):
        derive(run_config(*pool(1, 0.5)), 64, 1)


def test_reward_workers_that_ask_for_less_share_the_samplers_half(run_config):
    plan = derive(run_config(*pool(2, 0.2)), 8, 1)
    assert (plan.gpus, plan.samplers, plan.learners) == (1, 1, 1) and plan.reward_pools[0].beside
    assert (plan.sampler_gpus, plan.learner_gpus) == (pytest.approx(0.1), 0.5)
    plan = derive(run_config(*pool(3, 0.2), "prompts_per_step=48"), 64, 2)
    assert (plan.gpus, plan.sampler_gpus) == (2, pytest.approx(0.1)), "one of two GPUs has two of the three workers"
    plan = derive(run_config(*pool(1, 0.4), "cluster.samplers=1", "cluster.learners=1"), 8, 2)
    assert (plan.sampler_gpus, plan.learner_gpus) == (pytest.approx(0.6), 1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sd*.yaml")), ids=lambda path: path.stem)
def test_the_run_files_of_stable_diffusion_plan_on_one_gpu(path):
    plan = derive(load(path, []), 16, 1)
    assert (plan.samplers, plan.learners, plan.gpus) == (1, 1, 1)


def test_reward_workers_that_leave_samplers_nothing_of_a_gpu_are_refused(run_config):
    derive(run_config(*pool(3, 0.15)), 8, 1)
    with pytest.raises(UserError, match="rewards ask for 0.48 of a GPU.*a learner leaves 0.5; lower.*pool.gpus"):
        derive(run_config(*pool(3, 0.16)), 8, 1)


def test_reward_pools_that_leave_no_cores_are_refused(run_config):
    with pytest.raises(UserError, match="rewards ask for more CPU cores.*pool.cpus"):
        derive(run_config("rewards.judge.pool.cpus=2"), 2, 0)
