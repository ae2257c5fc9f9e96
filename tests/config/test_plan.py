import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from align_cluster.config.load import load
from align_cluster.config.plan import ROWS, Rows, chunk_bounds, derive, evaluation_pieces, settle, table
from align_cluster.errors import UserError
from align_cluster.learner.batching import assign_updates
from align_cluster.prompts.groups import plan_step
from align_cluster.types import Prompt

from ..cases import each

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
        derive(run_config("cluster.learners=2", "learner.micro_batch=12"), 8, 1)


def test_stated_counts_win_and_oversubscription_is_noted(run_config):
    plan = derive(run_config("cluster.samplers=4", "cluster.learners=1"), 2, 0)
    assert (plan.samplers, plan.learners) == (4, 1) and total_cpus(plan) <= 2
    assert any("share 2 cores" in note for note in plan.notes)


def test_no_more_workers_start_than_there_is_work(run_config):
    batches = ("prompts_per_step=3", "rollout.chunk=6", "learner.micro_batch=3")
    plan = derive(run_config(*batches), 16, 0)
    assert (plan.samplers, plan.learners) == (3, 6)
    plan = derive(run_config(*batches, "cluster.learners=9", "learner.updates_per_step=3"), 16, 0)
    assert plan.learners == 2 and "cluster.learners is 9" in plan.notes[0]


def test_the_work_of_a_step_adds_up(run_config):
    config = run_config("rollout.chunk=3", "learner.micro_batch=2", "learner.updates_per_step=2", "rollout.guidance=4")
    plan = derive(config, 2, 0)
    assert plan.images_per_step == 4 * 6 and plan.chunks_per_step == 8 and plan.chunk == 3
    # Chunks of 3 in micro-batches of 2 are two pieces each: 8 pieces an update, shared by two ranks.
    assert plan.micro_batch == 2 and plan.micro_batches == math.ceil(8 / 2 * 2 / 2)
    assert plan.rollout_calls == 8 * 4 * 2, "chunks x steps x two branches of guidance"


def test_a_settled_run_is_cut_alike_on_every_machine(run_config):
    small = derive(run_config(), 1, 0)
    large = derive(small.config, 256, 32)
    assert large.config == small.config
    cut = ("chunk", "micro_batch", "fold", "images_per_step", "chunks_per_step", "updates_per_step", "inner_passes")
    assert all(getattr(small, field) == getattr(large, field) for field in cut)


def test_the_table_says_everything_that_was_decided(run_config):
    plan = replace(derive(run_config(), 2, 0), notes=("something to know",))
    text = table(plan)
    for part in ("2 x 0.45 CPU", "24, in 2 chunks of 12", "note: something to know", "each in 3 passes, 3 at once"):
        assert part in text


def drawn_chunks(config):
    """The chunks of the first step of a settled run."""
    prompts, rollout = [Prompt(i, f"p{i}") for i in range(99)], config.rollout
    size = (config.prompts_per_step, rollout.group_size, rollout.chunk, config.conditions)
    return plan_step(prompts, 0, 0, *size, bounds=chunk_bounds(config))


@each("algorithm", ["nft", "grpo"])
@each("chunk", [None, 1, 4, 7, 24, 200])
def test_the_plan_of_an_exploring_run_counts_the_chunks_that_are_drawn(run_config, algorithm, chunk):
    cut = [] if chunk is None else [f"rollout.chunk={chunk}"]
    plan = derive(run_config("exploration.conditions=4", f"algorithm.kind={algorithm}", *cut), 2, 0)
    drawn = drawn_chunks(plan.config)
    assert plan.config.rollout.chunk == (chunk or 48) and plan.chunk == max(map(len, drawn)) == min(chunk or 48, 96)
    assert plan.chunks_per_step == len(drawn) == math.ceil(96 / plan.chunk)
    assert plan.images_per_step == sum(map(len, drawn)) == 4 * 6 * 4
    assert plan.rollout_calls == len(drawn) * 4 and plan.micro_batches * plan.learners >= len(drawn)


def test_one_condition_plans_like_no_exploration(run_config):
    changes = ([], ["exploration.conditions=1"], ["exploration.conditions=3"])
    plain, one, three = (derive(run_config(*change), 4, 0) for change in changes)
    assert replace(one, config=plain.config) == plain != replace(three, config=plain.config)


# ------------------------------------------------------------------------------------------- batches that are left open


def batches(config):
    return config.rollout.chunk, config.learner.micro_batch, config.learner.fold


SETTLED = [
    # 24 images and three noise levels each. Two cores take a half each, with all levels at once: 36 of 48 rows.
    ([], 2, 0, {}, (12, 12, 3)),
    # One core takes them in one batch, and two noise levels at once.
    ([], 1, 0, {}, (24, 24, 2)),
    (["learner.updates_per_step=2"], 1, 0, {}, (24, 12, 3)),
    (["cluster.threads=2"], 2, 0, {}, (24, 24, 2)),
    # 1152 images on 8 GPUs: three chunks of 48 each. Two updates of 576: two micro-batches of 36 each.
    (["prompts_per_step=48", "rollout.group_size=24", "learner.updates_per_step=2"], 64, 8, {}, (48, 36, 1)),
    # On 7 of them, where rewards have one to themselves: 1152 / 7 / 4.
    (["prompts_per_step=48", "rollout.group_size=24", "rewards.judge.pool.gpus=1"], 64, 8, {}, (42, 42, 1)),
    # Memory for 10 rows and for 4 with a backward pass: 24 / 2 / 2, and 24 / 2 / 3.
    ([], 2, 0, {"draw": 10, "train": 4}, (6, 4, 1)),
    ([], 2, 0, {"draw": 10, "train": 9}, (6, 6, 1)),
    # Log-probs: chunks are micro-batches, of one update and of what both workers can hold.
    (["algorithm.kind=grpo"], 2, 0, {}, (12, 12, 1)),
    (["algorithm.kind=grpo", "learner.updates_per_step=2"], 2, 0, {}, (6, 6, 1)),
    (["algorithm.kind=grpo", "learner.updates_per_step=2"], 2, 0, {"draw": 48, "train": 5}, (3, 3, 1)),
    (["algorithm.kind=grpo"], 2, 0, {"draw": 5, "train": 48}, (4, 4, 1)),
    (["algorithm.kind=ppo", "rollout.chunk=9"], 2, 0, {}, (9, 9, 1)),
]


@each(("overrides", "cores", "gpus", "most", "expected"), SETTLED)
def test_open_batches_share_a_step_out_evenly_within_memory(run_config, overrides, cores, gpus, most, expected):
    assert batches(settle(run_config(*overrides), cores, gpus, Rows(**most))) == expected


@each("algorithm", ["nft", "grpo"])
@each(("cores", "gpus"), [(1, 0), (2, 0), (7, 0), (64, 8)])
def test_settling_fills_what_is_open_and_only_that_and_never_looks_at_stated_workers(
    run_config, algorithm, cores, gpus
):
    stated = {"rollout.chunk": 10, "learner.micro_batch": 5, "learner.fold": 1}
    for given in product((False, True), repeat=3):
        named = [name for name, known in zip(stated, given, strict=True) if known]
        config = run_config(f"algorithm.kind={algorithm}", *(f"{name}={stated[name]}" for name in named))
        settled = settle(config, cores, gpus)
        for name, value, known in zip(stated, batches(settled), given, strict=True):
            assert value <= (stated[name] if known else ROWS), (name, named)
            if known and not (name == "learner.micro_batch" and settled.rollout.chunk < 5):
                assert value == stated[name], (name, named)
        parts = {name: getattr(config, name) for name in ("rollout", "learner", "loop")}
        opened = settled.model_copy(update=parts)
        assert opened == config, "nothing else changed"
        assert settle(settled, 3, 0) == settle(settled, 64, 8) == settled, "settled once and for all"
        for workers in ("cluster.samplers=5", "cluster.learners=1", "cluster.max_samplers=9"):
            other = run_config(f"algorithm.kind={algorithm}", *(f"{name}={stated[name]}" for name in named), workers)
            assert batches(settle(other, cores, gpus)) == batches(settled)


@each(("prompts", "members", "updates", "cores"), product((1, 3, 8), (2, 5, 24), (1, 2, 3), (1, 2, 5)))
@each("most", [Rows(), Rows(7, 48), Rows(48, 7)])
def test_where_log_probs_are_compared_every_micro_batch_is_a_whole_chunk_of_one_update(
    run_config, prompts, members, updates, cores, most
):
    if updates > prompts * members:
        return
    sizes = (f"prompts_per_step={prompts}", f"rollout.group_size={members}", f"learner.updates_per_step={updates}")
    config = settle(run_config("algorithm.kind=grpo", *sizes), cores, 0, most)
    lengths = [len(chunk) for chunk in drawn_chunks(config)]
    parts = assign_updates(lengths, config.update_bounds, config.learner.micro_batch)
    assert [(part.source, part.start, part.stop) for part in parts] == [(i, 0, n) for i, n in enumerate(lengths)]
    assert max(lengths) <= min(most.draw, most.train)
    for update in range(updates):
        own = [part.stop for part in parts if part.update == update]
        assert sum(own) == config.update_bounds[update + 1] - config.update_bounds[update]
        assert max(own) - min(own) <= 1


@each(("chunk", "pieces"), [(1, 8), (2, 4), (3, 8), (4, 2), (5, 1), (6, 4), (12, 2), (24, 1), (99, 1)])
def test_an_evaluation_comes_in_pieces_as_a_step_does(run_config, chunk, pieces):
    assert evaluation_pieces(settle(run_config(f"rollout.chunk={chunk}"), 2, 0)) == pieces


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
    config = run_config("algorithm.kind=grpo", "rollout.steps=6", "rollout.guidance=2", "rollout.chunk=6", *changes)
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
