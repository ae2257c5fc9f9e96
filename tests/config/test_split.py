"""Which cores or GPUs samplers and learners get where they work at the same time."""

from itertools import product

import pytest

from align_cluster.config.load import as_before, differences
from align_cluster.config.plan import derive, settle
from align_cluster.config.split import advice, best_split, step_time
from align_cluster.errors import UserError

from ..cases import each

AHEAD = ("loop.ahead=1", "prompts_per_step=48", "rollout.chunk=6", "learner.micro_batch=6")  # 48 chunks


@each(("samplers", "learners", "ahead"), [(None, None, 0), (1, None, 0), (None, 1, 0), (1, 1, 1), (2, 1, 0), (1, 2, 0)])
def test_gpus_draw_ahead_where_both_numbers_are_stated_and_fit_beside_each_other_and_cpus_where_it_is_asked(
    run_config, samplers, learners, ahead
):
    stated = [f"cluster.{name}={n}" for name, n in (("samplers", samplers), ("learners", learners)) if n]
    assert settle(run_config(*stated), 8, 2).loop.ahead == ahead
    assert settle(run_config(*stated, "loop.ahead=0"), 8, 2).loop.ahead == 0
    assert settle(run_config(*stated), 2, 0).loop.ahead == 0
    assert settle(run_config(*stated, "loop.ahead=1"), 2, 0).loop.ahead == 1
    assert settle(run_config(*stated, "rewards.judge.pool.gpus=1"), 2, 3).loop.ahead == ahead


def test_a_run_keeps_what_it_began_with_and_one_from_before_the_setting_draws_nothing_ahead(run_config):
    stated = ("cluster.samplers=1", "cluster.learners=1")
    began = settle(run_config(*stated), 8, 2)
    old = began.model_dump(mode="json")
    assert settle(as_before(old, run_config(*stated)), 1, 0).loop.ahead == 1
    assert differences(old, run_config("loop.ahead=0")) == ["loop.ahead: 1 there, 0 here"]
    del old["loop"]
    assert settle(as_before(old, run_config(*stated)), 8, 2).loop.ahead == 0
    assert differences(old, run_config("loop.ahead=1")) == ["loop.ahead: 0 there, 1 here"]


@each(("work", "places"), product([(1.0, 0.25), (1.0, 1.0), (1.0, 3.4), (0.0, 1.0)], [2, 3, 8, 13]))
@each("pieces", [(1, 1), (2, 48), (48, 2), (96, 36)])
def test_no_other_split_is_quicker_and_none_as_quick_has_fewer_workers(work, places, pieces):
    found = best_split(work, pieces, places)
    shortest = step_time(work, pieces, found)
    for samplers in range(1, places):
        for learners in range(1, places - samplers + 1):
            seconds = step_time(work, pieces, (samplers, learners))
            assert seconds > shortest or sum(found) <= samplers + learners or seconds == pytest.approx(shortest)
            assert seconds >= shortest - 1e-12


def test_a_step_takes_as_long_as_the_slower_of_both_or_as_both_in_turns():
    assert step_time((8.0, 12.0), (8, 6), (2, 3)) == 4.0
    assert step_time((8.0, 12.0), (8, 6), (2, 3), ahead=False) == 8.0
    assert step_time((8.0, 12.0), (8, 6), (3, 5)) == 4.0, "eight chunks on three samplers are three rounds"
    assert step_time((8.0, 12.0), (8, 6), (99, 99)) == 2.0, "more workers than pieces are idle"


@each(("work", "workers"), [(1.0, (4, 4)), (3.4, (2, 6)), (0.5, (5, 3)), (0.9, (4, 4))])
def test_eight_gpus_are_shared_out_by_the_work_and_each_has_one_worker(run_config, work, workers):
    plan = derive(run_config(*AHEAD), 64, 8, work=work)
    assert (plan.samplers, plan.learners) == workers
    assert (plan.sampler_gpus, plan.learner_gpus, plan.together, plan.hosts) == (1, 1, 1, workers[0])


@each(
    ("stated", "workers"), [(["samplers=3"], (3, 5)), (["learners=7"], (1, 7)), (["samplers=2", "learners=2"], (2, 2))]
)
def test_stated_numbers_win_and_the_other_pool_gets_the_rest(run_config, stated, workers):
    plan = derive(run_config(*AHEAD, *(f"cluster.{one}" for one in stated)), 64, 8)
    assert (plan.samplers, plan.learners) == workers


def test_on_cores_each_worker_has_one_nearly_to_itself(run_config):
    plan = derive(run_config("loop.ahead=1"), 2, 0)
    assert (plan.samplers, plan.learners, plan.sampler_cpus, plan.learner_cpus) == (1, 1, 0.9, 0.9)
    assert plan.reward_pools[0].cpus == pytest.approx(0.1)
    crowd = derive(run_config("loop.ahead=1", "cluster.samplers=3", "cluster.learners=1"), 2, 0)
    assert (crowd.sampler_cpus, crowd.learner_cpus) == (0.45, 0.45)
    assert any("4 workers with 1 threads share 2 cores" in note for note in crowd.notes)


@each(
    ("overrides", "cores", "gpus", "said"),
    [
        ([], 1, 0, "loop.ahead is 1, and among the cores there is room for one worker.*set loop.ahead to 0"),
        (["cluster.threads=2"], 3, 0, "room for one worker .cluster.threads is 2."),
        ([], 8, 1, "among the GPUs there is room for one worker"),
        (["rewards.judge.pool.gpus=1"], 8, 2, "among the GPUs there is room for one worker"),
        (["cluster.samplers=5", "cluster.learners=4"], 8, 8, "5 samplers and 4 learners cannot be beside .* 8 GPUs"),
        (["cluster.samplers=8"], 8, 8, "8 samplers and 1 learners cannot be beside each other on 8 GPUs"),
    ],
)
def test_what_cannot_be_beside_each_other_is_one_sentence(run_config, overrides, cores, gpus, said):
    with pytest.raises(UserError, match=said) as refused:
        derive(run_config(*AHEAD, *overrides), cores, gpus)
    assert "\n" not in str(refused.value)


def test_a_deeper_queue_is_refused_with_the_reason(run_config):
    for deep in (2, 7):
        with pytest.raises(UserError, match=f"loop.ahead is {deep}; it must be 0 or 1: one step ahead already keeps"):
            run_config(f"loop.ahead={deep}")


def test_advice_names_the_better_split_and_keeps_quiet_about_a_good_one():
    said = advice((8.0, 24.0), (48, 48), (4, 4), 6.5)
    assert "cluster.samplers 2 and cluster.learners 6 a step would take about 4.3" in said and "6.5" in said
    assert advice((8.0, 24.0), (48, 48), (2, 6), 4.5) is None and advice((1.0, 1.05), (9, 9), (1, 1), 2.0) is None
