"""The supervised pool, with small plain actors in the place of samplers."""

import importlib.util
import os
import signal
import time
import zipfile
from dataclasses import replace

import pytest

from align_cluster.cluster.learners import LearnerGroup
from align_cluster.cluster.pool import DEPTH, GivenUp, Patience, Pool, stream
from align_cluster.cluster.workers import make_reward_worker
from align_cluster.config.plan import derive
from align_cluster.types import UserError


class Sleeper:
    """Takes its time to start."""

    def __init__(self) -> None:
        time.sleep(3)

    def add(self, number: int) -> int:
        return number


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

    def make(size: int, timeout_s: float = 60.0, *args, **settings) -> Pool:
        actor = local_ray.remote(Adder).options(num_cpus=0)
        pools.append(Pool("adder", lambda name, index: actor.remote(name, *args), size, timeout_s, **settings))
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


def test_a_pool_grows_while_there_is_a_backlog_and_lets_idle_hands_go(make_pool):
    pool = make_pool(1, most=3)
    for number in range(16):
        pool.submit(number, "add", number, 0.2)
        pool.grow()
    assert len(pool.workers) == 2 and len(pool.staff) == 1  # the second one is coming; a third may follow it
    assert sorted(done.value for done in stream(pool)) == list(range(16))
    spare = pool.workers[1]
    assert spare in pool.staff and spare.used
    pool.trim()  # it was needed
    pool.submit(0, "add", 0)
    assert [done.value for done in stream(pool)] == [0] and spare in pool.workers
    pool.trim()  # it was not
    assert spare not in pool.workers and len(pool.workers) == 1
    pool.grow(), pool.grow()
    assert len(pool.workers) == 2


def test_a_lost_spare_hands_its_calls_back_and_is_not_replaced(make_pool, pid_of):
    pool = make_pool(1, most=2)
    pool.grow()
    pid = pid_of(pool.workers[1].actor)
    for number in range(2):
        pool.submit(number, "add", number, 0.5)
    list(stream(pool))
    assert len(pool.staff) == 2
    for number in range(8):
        pool.submit(number, "add", number, 0.2)
    assert pool.workers[1].calls
    os.kill(pid, signal.SIGKILL)
    assert sorted(done.value for done in stream(pool)) == list(range(8))
    assert len(pool.workers) == 1 and pool.lost == 1


def test_a_call_that_hangs_loses_its_workers_and_is_given_up_and_the_others_are_not(make_pool, pid_of):
    pool = make_pool(1, patience=Patience(deadline_s=2.0, tries=2))
    pid_of(pool.workers[0].actor)
    pool.submit("slow", "add", 1, 600.0)
    for number in range(3):
        pool.submit(number, "add", number)
    results = {done.key: done.value for done in stream(pool)}
    assert {number: results[number] for number in range(3)} == {0: 0, 1: 1, 2: 2}
    assert results["slow"] == GivenUp("timeout", "adder lost 2 workers: adder-1 gave no answer in 2 s")
    assert pool.lost == 2


def test_a_call_that_kills_its_workers_is_given_up_where_that_is_wanted(make_pool):
    pool = make_pool(1, patience=Patience(deadline_s=60.0, tries=2))
    pool.submit("poison", "die")
    pool.submit(1, "add", 1)
    results = {done.key: done.value for done in stream(pool)}
    assert results[1] == 1 and results["poison"].kind == "unavailable" and "lost 2 workers" in results["poison"].message


def test_the_time_that_a_worker_takes_to_start_does_not_count_as_work(local_ray, by_value):
    actor = local_ray.remote(Sleeper).options(num_cpus=0)
    pool = Pool("sleeper", lambda name, index: actor.remote(), 1, 60.0, patience=Patience(1.0, 1))
    pool.submit(0, "add", 5)
    assert [done.value for done in stream(pool)] == [5] and pool.lost == 0
    pool.shutdown()


@pytest.fixture
def wheel(tmp_path):
    """A distribution with one module, own_dependency, that is installed nowhere."""
    path, info = tmp_path / "own_dependency-1.0-py3-none-any.whl", "own_dependency-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("own_dependency.py", "VALUE = 42\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: own_dependency\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.slow  # Ray copies the whole environment first
def test_a_rewards_workers_have_packages_of_their_own(local_ray, by_value, tiny, wheel):
    config = tiny("nft", f"rewards.clip.pool.pip=[{wheel}]")
    pool = derive(config, 2, 0).reward_pools[1]
    worker = make_reward_worker(config, derive(config, 2, 0), replace(pool, cpus=0.01), None)
    found = worker.__ray_call__.remote(lambda _: __import__("own_dependency").VALUE)
    assert pool.pip == (str(wheel),) and local_ray.get(found, timeout=300) == 42
    local_ray.kill(worker)
    assert importlib.util.find_spec("own_dependency") is None


@pytest.mark.slow  # Ray copies the whole environment first
def test_packages_that_cannot_be_installed_are_one_sentence(local_ray, by_value, tmp_path):
    missing = {"packages": [f"{tmp_path}/nowhere-1.0-py3-none-any.whl"]}
    actor = local_ray.remote(Adder).options(num_cpus=0, runtime_env={"pip": missing})
    pool = Pool("reward adder", lambda name, index: actor.remote(name), 1, 300.0)
    pool.submit(0, "add", 1)
    with pytest.raises(UserError, match="^reward adder-0: its packages cannot be installed .*nowhere.*pool.pip$"):
        list(stream(pool))
    pool.shutdown()
