"""Whether runs fit, on made-up sizes: 10 GB of denoiser, 1 of VAE, 8 of text encoders, 6 for a chunk, 20 an update."""

from dataclasses import replace
from pathlib import Path

import pytest

from align_cluster.config.load import load
from align_cluster.config.plan import derive
from align_cluster.config.rules import work_can_be_cut
from align_cluster.planner.count import Usage
from align_cluster.planner.fit import (
    CONTEXT,
    changed,
    fits,
    fullest_gpu,
    hints,
    learner_memory,
    options,
    reward_bytes,
    sampler_memory,
)
from align_cluster.planner.memory import LearnerUsage, Sizes
from align_cluster.planner.report import image_flops, roles, step_seconds

from ..cases import each

GB = 10**9
SIZES = Sizes(
    parameters={"transformer": 5 * GB, "lora": GB // 4},
    itemsize=2,
    denoiser=10 * GB,
    vae=GB,
    text=8 * GB,
    adapter=GB,
    adapters=2,
    draw=Usage(2 * GB, 12 * 10**12),
    decode=Usage(6 * GB, 24 * 10**12),
    plain=LearnerUsage(Usage(20 * GB, 48 * 10**12)),
    checkpointed=LearnerUsage(Usage(4 * GB, 60 * 10**12)),
)
SAMPLER = 10 + 1 + 8 + 1 + 6  # with an adapter
LEARNER = 10 + 2 + 1 + 20  # with two adapters and an average; the optimiser comes on top
RUN = Path(__file__).parents[2] / "configs" / "sd35_medium_nft.yaml"


def planned(gpus=1, *overrides):
    plan = derive(load(RUN, overrides), 64, gpus)
    return plan.config, plan


def test_a_gpu_holds_its_sampler_its_learner_and_the_rewards_that_share_it():
    config, plan = planned()
    assert sampler_memory(config, plan, SIZES).total == SAMPLER * GB
    optimizer = 3 + 2  # moments and a copy, a bucket and gradients
    assert learner_memory(config, plan, SIZES).total == (LEARNER + optimizer) * GB
    rewards = reward_bytes(config, ("geneval",))
    assert rewards == 4 * (68.7e6 + 427.6e6)
    assert fullest_gpu(config, plan, SIZES) == (SAMPLER + LEARNER + 5) * GB + 2 * rewards + 4 * CONTEXT
    config, plan = planned(1, "cluster.samplers=2", "rewards.geneval.pool.gpus=0")
    assert fullest_gpu(config, plan, SIZES) == (2 * SAMPLER + LEARNER + 5) * GB + 3 * CONTEXT


def test_roles_on_gpus_of_their_own_do_not_add_up():
    config, plan = planned(2, "cluster.samplers=1", "cluster.learners=1", "rewards.geneval.pool.gpus=0")
    assert plan.apart and fullest_gpu(config, plan, SIZES) == (LEARNER + 5) * GB + CONTEXT
    config, plan = planned(3, "rewards.geneval.pool.gpus=0.5")
    assert fullest_gpu(config, plan, replace(SIZES, denoiser=0, text=0, plain=LearnerUsage(Usage(0, 0)))) < 20 * GB
    assert fullest_gpu(config, plan, SIZES) == fullest_gpu(*planned(2, "rewards.geneval.pool.gpus=0"), SIZES)


def test_zero_shares_more_between_ranks_from_stage_to_stage():
    for stage, optimizer, weights in ((0, 3, 10), (1, 2 + 0.75, 10), (2, 1 + 0.25 + 0.75, 10), (3, 2, 2.5 + 2)):
        config, plan = planned(4, f"learner.zero_stage={stage}")
        role = learner_memory(config, plan, SIZES)
        assert (role.optimizer, role.weights) == (optimizer * GB, weights * GB)
        assert role.lora == pytest.approx((2 / (4 if stage == 3 else 1) + 1) * GB)


def test_the_average_and_the_text_encoders_count_where_they_are_kept():
    plain, plan = planned()
    assert learner_memory(*planned(1, "learner.ema=0"), SIZES).lora == learner_memory(plain, plan, SIZES).lora - GB
    for place in ("cpu", "free"):
        away = sampler_memory(*planned(1, f"backbone.text={place}"), SIZES)
        assert away.weights == sampler_memory(plain, plan, SIZES).weights - 8 * GB


def test_what_fits_leaves_a_twentieth_free():
    assert fits(95, 100) and not fits(95.1, 100)


def test_hints_are_the_settings_that_save_most():
    config, plan = planned(1, "rewards.geneval.pool.gpus=0")
    assert (plan.chunk, plan.micro_batch, plan.fold) == (12, 12, 3)
    assert [(hint.setting, hint.saves / GB) for hint in hints(config, plan, SIZES)] == [
        ("learner.gradient_checkpointing: true", 20 - 4),
        ("learner.fold: 1", pytest.approx(20 * 2 / 3)),
        ("rollout.chunk: 6, learner.micro_batch: 6, learner.fold: 3", 6 / 2 + 20 / 2),
    ]
    found = hints(*planned(2, "rewards.geneval.pool.gpus=0", "learner.gradient_checkpointing=true"), SIZES)
    apart = "cluster.samplers: 1, cluster.learners: 1"
    chunk = "rollout.chunk: 6, learner.micro_batch: 6, learner.fold: 3"
    assert [hint.setting for hint in found] == [apart, "backbone.text: free", chunk]


@each(
    ("stated", "count"),
    [
        (("learner.micro_batch=3",), 7),  # fold: 15 rows at most
        (("learner.micro_batch=3", "learner.fold=1"), 6),
        ((), 7),
        (("rollout.chunk=24", "algorithm.kind=grpo", "rollout.step=null", "advantage.std=group"), 5),
    ],
)
def test_options_are_settings_that_a_run_file_takes(stated, count):
    """Planned anew with an option, a run holds what the option promises."""
    stated = ("rewards.geneval.pool.gpus=0", *stated)
    config, plan = planned(2, *stated)
    found = list(options(config, plan))
    assert len(found) == count
    for text, changed_config, changed_plan in found:
        again, replanned = planned(2, *stated, *(setting.replace(": ", "=") for setting in text.split(", ")))
        assert not list(work_can_be_cut(again)), text
        same_sizes = replace(replanned, chunk=plan.chunk, micro_batch=plan.micro_batch, fold=plan.fold)
        mine = fullest_gpu(changed_config, changed_plan, SIZES)
        assert mine == pytest.approx(fullest_gpu(again, same_sizes, SIZES)), text


def test_flops_and_seconds_follow_the_plan():
    config, plan = planned(2, "rollout.guidance=1")
    flops = image_flops(config, plan, SIZES)
    assert flops["rollout"] == (10 * 12 + 24) * 10**12 / 12
    assert flops["update"] == 9 * 48 * 10**12 / (12 * 3), "an update is counted with three noise levels at once"
    assert flops["reward"] == pytest.approx(448.7e9 + 162e9)
    seconds = step_seconds(config, plan, flops, "H100")
    images, rate = 48 * 24, 0.4 * 989e12
    assert seconds["rollout"] == pytest.approx(images * flops["rollout"] / rate / 2)
    assert seconds["update"] == pytest.approx(images * flops["update"] / rate / 2)
    assert seconds["reward"] == pytest.approx(images * flops["reward"] / (0.4 * 67e12) / 2)
    checkpointed = changed(config, "learner", gradient_checkpointing=True)
    assert image_flops(checkpointed, plan, SIZES)["update"] == 9 * 60 * 10**12 / (12 * 3)


def test_roles_name_what_the_run_has_and_what_the_learner_could_have():
    names = list(roles(*planned(), SIZES))
    assert names[:2] == ["sampler", "learner, ZeRO 2"] and names[-1] == "rewards geneval"
    assert names[2:-1] == [f"learner with {what}" for what in ("ZeRO 0", "ZeRO 1", "ZeRO 3", "checkpointing")]
