"""The supervised pool, with small plain actors in the place of samplers."""

import os
import signal
import time

import pytest

from align_cluster.cluster.learners import LearnerGroup
from align_cluster.cluster.pool import DEPTH, Pool, stream
from align_cluster.types import UserError


class Adder:
    """Adds to its offset; every method that misbehaves does so on request."""

    def __init__(self, name: str = "adder", mistake: Exception | None = None) -> None:
        if mistake:
            raise mistake
        self.name, self.offset, self.calls = name, 0, []

    def set_offset(self, offset: int) -> int:
        self.offset = offset
        return offset

    def add(self, number: int, seconds: float = 0.0) -> int:
        time.sleep(seconds)
        return number + self.offset

    def split(self, number: int) -> tuple[str, int]:
        return self.name, number

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def refuse(self) -> None:
        raise ValueError("three is not a prompt")


@pytest.fixture
def make_pool(local_ray, by_value):
    """Function (size, timeout_s, *constructor arguments) -> Pool of Adders; closed after the test."""
    pools = []

    def make(size: int, timeout_s: float = 60.0, *args) -> Pool:
        actor = local_ray.remote(Adder).options(num_cpus=0)
        pools.append(Pool("adder", lambda name, index: actor.remote(name, *args), size, timeout_s))
        return pools[-1]

    yield make
    for pool in pools:
        pool.shutdown()


def test_every_call_comes_back_once_under_its_key(make_pool):
    pool = make_pool(2)
    for number in range(7):
        pool.submit(number, "add", 10 * number)
    results = [(done.key, done.value) for done in stream(pool)]
    assert sorted(results) == [(number, 10 * number) for number in range(7)]
    assert not pool.busy


def test_a_worker_has_at_most_two_calls_queued_and_calls_start_in_order(make_pool):
    pool = make_pool(1)
    for number in range(5):
        pool.submit(number, "add", number)
    assert len(pool.workers[0].calls) == DEPTH == 2
    assert [done.key for done in stream(pool)] == [0, 1, 2, 3, 4]


def test_work_may_be_submitted_to_another_pool_while_results_stream(make_pool):
    first, second = make_pool(1), make_pool(1)
    for number in range(3):
        first.submit(number, "split", number, returns=2)
    sums = {}
    for done in stream(first, second):
        if done.pool is first:
            assert done.value == "adder-0"
            second.submit(done.key, "add", done.refs[0])
        else:
            sums[done.key] = done.value
    assert sums == {0: 0, 1: 1, 2: 2}


def test_a_killed_workers_calls_are_reissued_and_its_successor_has_the_current_state(make_pool, pid_of):
    pool = make_pool(2)
    assert pool.broadcast("set_offset", 100, sticky=True) == [100, 100]
    victim = pool.workers[0]
    pid = pid_of(victim.actor)
    for number in range(6):
        pool.submit(number, "add", number, 0.2)
    os.kill(pid, signal.SIGKILL)
    results = {done.key: done.value for done in stream(pool)}
    assert results == {number: 100 + number for number in range(6)}
    assert pool.lost == 1 and victim not in pool.workers
    assert [worker.name for worker in pool.workers] == ["adder-2", "adder-1"]


def test_a_broadcast_reaches_the_successor_of_a_dead_worker(make_pool, pid_of):
    pool = make_pool(2)
    os.kill(pid_of(pool.workers[1].actor), signal.SIGKILL)
    assert pool.broadcast("set_offset", 5, sticky=True) == [5, 5]
    assert pool.lost == 1


def test_a_call_that_kills_every_worker_fails_after_four_attempts(make_pool):
    pool = make_pool(1)
    pool.submit("poison", "die")
    with pytest.raises(RuntimeError, match=r"die\(poison\) lost its worker 4 times"):
        list(stream(pool))
    assert pool.lost == 4


def test_an_error_of_the_work_rises_as_it_is_and_at_once(make_pool):
    pool = make_pool(1)
    began = time.monotonic()
    pool.submit(0, "refuse")
    with pytest.raises(ValueError, match="three is not a prompt"):
        list(stream(pool))
    with pytest.raises(ValueError, match="three is not a prompt"):
        pool.broadcast("refuse")
    assert time.monotonic() - began < 20 and pool.lost == 0


def test_a_constructor_that_refuses_is_not_hired_again(make_pool):
    pool = make_pool(1, 60.0, UserError("rewards.clip.path: there is no such folder; give one"))
    pool.submit(0, "add", 1)
    with pytest.raises(UserError, match=r"^rewards.clip.path: there is no such folder; give one$"):
        list(stream(pool))
    assert pool.born == 1
    pool = make_pool(1, 60.0, KeyError("weights"))
    with pytest.raises(RuntimeError, match="(?s)adder-0 could not start.*weights"):
        pool.broadcast("set_offset", 1)


def test_a_worker_that_is_late_is_named(make_pool, pid_of):
    pool = make_pool(1, 1.0)
    pid_of(pool.workers[0].actor)  # started, which may take longer than a second
    pool.submit((3, 0, 4), "add", 1, 30.0)
    with pytest.raises(TimeoutError, match=r"nothing finished for 1 s; waiting for adder-0: add\(3, 0, 4\)"):
        list(stream(pool))


def test_a_late_broadcast_is_named(make_pool, pid_of):
    pool = make_pool(1, 1.0)
    pid_of(pool.workers[0].actor)
    with pytest.raises(TimeoutError, match=r"adder-0 did not answer add\(\) within 1 s"):
        pool.broadcast("add", 1, 30.0)


def test_a_late_learner_rank_ends_the_wait(make_pool, pid_of):
    quick, late = (worker.actor for worker in make_pool(2).workers)
    pid_of(quick), pid_of(late)
    ranks = LearnerGroup.__new__(LearnerGroup)  # its waiting alone, without a learner
    ranks.timeout_s = 2.0
    assert ranks.wait([actor.add.remote(1) for actor in (quick, late)]) == [1, 1]
    with pytest.raises(TimeoutError, match=r"learner ranks did not finish within 2 s: 1 are late"):
        ranks.wait([quick.add.remote(1), late.add.remote(1, 30.0)])
    with pytest.raises(ValueError, match="three is not a prompt"):  # at once, although the other rank is busy
        ranks.wait([late.add.remote(1, 30.0), quick.refuse.remote()])
