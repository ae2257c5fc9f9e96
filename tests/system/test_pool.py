"""The supervised pool, with small plain actors in the place of samplers."""

import importlib.util
import os
import signal
import time
import zipfile
from dataclasses import replace

import pytest

from align_cluster.cluster import learners, slots
from align_cluster.cluster import pool as pool_module
from align_cluster.cluster.actors import make_reward_worker
from align_cluster.cluster.errors import reason
from align_cluster.cluster.pool import DEPTH, Pool, stream
from align_cluster.cluster.slots import MAX_FAILURES, GivenUp, RetryPolicy
from align_cluster.config.plan import derive
from align_cluster.errors import UserError


class Sleeper:
    """Takes its time to start."""

    def __init__(self) -> None:
        time.sleep(3)

    def add(self, number: int) -> int:
        return number


class Stillborn:
    """Dies while it starts."""

    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Adder:
    """Adds to its offset; every method that misbehaves does so on request."""

    def __init__(self, name: str = "adder", mistake: Exception | None = None, cursed: bool = False) -> None:
        if mistake:
            raise mistake
        self.name, self.offset, self.cursed = name, 0, cursed

    def set_offset(self, offset: int, seconds: float = 0.0) -> int:
        time.sleep(seconds)
        self.offset = offset
        return offset

    def add(self, number: int, seconds: float = 0.0) -> int:
        if self.cursed:
            self.die()
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

    def make(size: int, timeout_s: float = 240.0, mistake=None, cursed=(), **settings) -> Pool:
        actor = local_ray.remote(Adder).options(num_cpus=0)

        def hire(name: str, index: int):
            return actor.remote(name, mistake, index in cursed)

        pools.append(Pool("adder", hire, size, timeout_s, **settings))
        return pools[-1]

    yield make
    for pool in pools:
        pool.shutdown()


def bring_up(pool: Pool) -> Pool:
    """The pool with all of its workers up."""
    timeout, pool.timeout_s = pool.timeout_s, 240.0
    pool.wait_until(lambda: len(pool.ready_workers) == pool.size)
    pool.timeout_s = timeout
    return pool


def test_every_call_comes_back_once_under_its_key(make_pool):
    pool = make_pool(2)
    for number in range(7):
        pool.submit(number, "add", 10 * number)
    results = [(done.key, done.value) for done in stream(pool)]
    assert sorted(results) == [(number, 10 * number) for number in range(7)]
    assert not pool.busy


def test_a_worker_has_at_most_two_calls_queued_and_calls_start_in_order(make_pool):
    pool = make_pool(1)
    pool.submit(-1, "add", 0)
    assert not pool.workers[0].calls  # it is still coming, and another one may come first
    bring_up(pool)
    for number in range(5):
        pool.submit(number, "add", number)
    assert len(pool.workers[0].calls) == DEPTH == 2
    assert [done.key for done in stream(pool)] == [-1, 0, 1, 2, 3, 4]


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
    pool = bring_up(make_pool(2))
    assert pool.broadcast("set_offset", 100) == [100, 100]
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
    proofs = []
    pool = bring_up(make_pool(2, verify=proofs.append))
    os.kill(pid_of(pool.workers[1].actor), signal.SIGKILL)
    assert pool.broadcast("set_offset", 5)[0] == 5 and pool.lost == 1  # who is up does not wait for who is coming
    for number in range(4):
        pool.submit(number, "add", number, 3.0)
    assert {done.value for done in stream(pool)} == {5, 6, 7, 8}
    assert proofs == [5, 5] and [worker.answer for worker in pool.workers] == [5, 5]


def test_a_broadcast_waits_for_the_first_worker_that_comes(make_pool):
    assert make_pool(2).broadcast("set_offset", 7)[0] == 7


def test_a_state_that_is_not_what_it_must_be_is_an_error_for_late_comers_too(make_pool, pid_of):
    def prove(answer: int) -> None:
        if answer != 5:
            raise RuntimeError("offset 5 was lost on the way")

    pool = make_pool(1, verify=prove)
    with pytest.raises(RuntimeError, match="offset 5 was lost on the way"):
        pool.broadcast("set_offset", 6)


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
    pool = make_pool(1, mistake=UserError("rewards.clip.path: there is no such folder; give one"))
    pool.submit(0, "add", 1)
    with pytest.raises(UserError, match=r"^rewards.clip.path: there is no such folder; give one$"):
        list(stream(pool))
    assert pool.started == 1
    pool = make_pool(1, mistake=KeyError("weights"))
    with pytest.raises(RuntimeError, match="(?s)adder-0 could not start.*weights"):
        pool.broadcast("set_offset", 1)


@pytest.mark.slow
def test_a_worker_that_is_late_is_replaced_once_and_then_named(make_pool):
    pool = bring_up(make_pool(1, 8.0))
    pool.submit((3, 0, 4), "add", 1, 60.0)
    with pytest.raises(TimeoutError, match=r"adder-1 gave no answer to add \(3, 0, 4\) in 8 s"):
        list(stream(pool))
    assert pool.lost == 2 and "adder-0 gave no answer" in pool.events[0][1]


def test_work_of_a_worker_that_hangs_is_done_by_another(make_pool, pid_of):
    pool = bring_up(make_pool(2, 3.0))
    os.kill(pid_of(pool.workers[0].actor), signal.SIGSTOP)
    for number in range(4):
        pool.submit(number, "add", number)
    assert sorted(done.value for done in stream(pool)) == [0, 1, 2, 3] and pool.lost == 1


def test_who_is_late_for_a_broadcast_is_replaced_and_named_where_nobody_answers(make_pool, pid_of):
    pool = bring_up(make_pool(2, 3.0))
    os.kill(pid_of(pool.workers[0].actor), signal.SIGSTOP)
    assert pool.broadcast("set_offset", 1)[0] == 1 and pool.lost == 1
    pool = bring_up(make_pool(1, 2.0))
    with pytest.raises(TimeoutError, match=r"adder is not ready after \d+ s: .*, after: adder-. gave no answer"):
        pool.broadcast("set_offset", 1, 30.0)


def test_a_seat_whose_workers_die_again_and_again_is_quarantined_and_the_others_do_the_work(make_pool, monkeypatch):
    monkeypatch.setattr(pool_module, "BACKOFF_S", 0.1)
    pool = bring_up(make_pool(2, cursed={1}))
    while pool.lost < MAX_FAILURES:
        for number in range(2):
            pool.submit(number, "add", number, 0.05)
        assert sorted(done.value for done in stream(pool)) == [0, 1]
    (slot,) = pool.empty_slots
    assert slot.index == 1 and slot.quarantined and 200 < slot.due - time.monotonic() <= 300
    (doing,) = [doing for doing in pool.status() if "slot 1" in doing.worker]
    assert doing.phase.startswith("quarantined, next try in") and slot.error in doing.phase
    assert doing.since == slot.lost == slot.due - 300 and not doing.waiting
    assert "slot 1 is quarantined for 300 s after 5 workers in a row" in pool.events[-1][1]
    slot.due, make = time.monotonic(), pool.make  # time goes by, and the node was mended
    pool.make = lambda name, index: make(name, 0)
    while slot.failures:
        for number in range(2):
            pool.submit(number, "add", number, 0.05)
        list(stream(pool))
    assert len(pool.workers) == 2 and not pool.empty_slots and pool.lost == MAX_FAILURES


def test_workers_that_die_while_they_start_come_with_growing_pauses_and_end_the_run_in_the_end(local_ray, by_value):
    actor, started = local_ray.remote(Stillborn).options(num_cpus=0), []

    def hire(name: str, index: int):
        started.append(time.monotonic())
        return actor.remote()

    pool = Pool("stillborn", hire, 1, 60.0)
    pool.submit(0, "add", 1)
    with pytest.raises(RuntimeError, match="stillborn: no worker lives long enough to do anything, the last with: .+"):
        list(stream(pool))
    assert len(started) == pool.lost == MAX_FAILURES
    pauses = [later - earlier for earlier, later in zip(started, started[1:], strict=False)]
    assert all(pause > least for pause, least in zip(pauses, (0, 0.5, 1, 2), strict=True))


def test_the_reason_of_a_loss_is_one_line():
    page = "The actor died unexpectedly.\n\tpid: 7\nThe actor is dead because its node has died. Node Id: 1f"
    assert reason(RuntimeError(page)) == "its node has died. Node Id: 1f"
    detail = (
        "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker exits. End of file. Some common causes include: (1)"
    )
    assert reason(RuntimeError(f"The actor is dead because its worker process has died. {detail}")) == (
        "Worker exits. End of file"
    )
    assert reason(TimeoutError("adder-0 gave no answer\nmore")) == "adder-0 gave no answer"
    assert reason(KeyError()) == "KeyError"


def test_a_successor_whose_constructor_fails_is_a_loss_where_others_came_up(make_pool, local_ray, monkeypatch, pid_of):
    monkeypatch.setattr(slots, "MAX_FAILURES", 3)
    monkeypatch.setattr(pool_module, "BACKOFF_S", 0.1)
    pool = bring_up(make_pool(2))
    broken = local_ray.remote(Adder).options(num_cpus=0)
    pool.make = lambda name, index: broken.remote(name, OSError("the weights are gone"))
    os.kill(pid_of(pool.workers[1].actor), signal.SIGKILL)
    while pool.lost < 3:
        for number in range(2):
            pool.submit(number, "add", number, 0.05)
        assert sorted(done.value for done in stream(pool)) == [0, 1]
    (slot,) = pool.empty_slots
    assert slot.quarantined and slot.error == "OSError: the weights are gone"


def test_a_late_learner_rank_ends_the_wait(make_pool, pid_of, monkeypatch):
    monkeypatch.setattr(learners, "GRACE_S", 0.5)
    quick, late = (worker.actor for worker in make_pool(2).workers)
    pid_of(quick), pid_of(late)
    ranks = learners.LearnerGroup.__new__(learners.LearnerGroup)  # its waiting alone, without a learner
    ranks.timeout_s, ranks.start_timeout_s, ranks.asked = 2.0, 2.0, []
    ranks.ranks, ranks.wait = [], learners.first_ready
    assert ranks._wait([actor.add.remote(1) for actor in (quick, late)]) == [1, 1]
    with pytest.raises(
        learners.RankLost, match=r"1 of 2 learner ranks did not finish within the 2 s of cluster.timeout_s"
    ):
        ranks._wait([quick.add.remote(1), late.add.remote(1, 30.0)])
    with pytest.raises(learners.RankLost, match=r"did not load their model within the 2 s of cluster.start_timeout_s"):
        ranks._wait([late.add.remote(1, 30.0)], "start_timeout_s")
    with pytest.raises(ValueError, match="three is not a prompt"):  # although the other rank is busy
        ranks._wait([late.add.remote(1, 30.0), quick.refuse.remote()])


def test_a_pool_grows_while_there_is_a_backlog_and_lets_idle_hands_go(make_pool):
    pool = bring_up(make_pool(1, max_size=3))
    for number in range(16):
        pool.submit(number, "add", number, 0.2)
        pool.grow()
    assert len(pool.workers) == 2 and len(pool.ready_workers) == 1  # the second one is coming; a third may follow it
    assert sorted(done.value for done in stream(pool)) == list(range(16))
    spare = pool.workers[1]
    assert spare in pool.ready_workers and spare.used
    pool.trim()  # it was needed
    pool.submit(0, "add", 0)
    assert [done.value for done in stream(pool)] == [0] and spare in pool.workers
    pool.trim()  # it was not
    assert spare not in pool.workers and len(pool.workers) == 1
    pool.grow(), pool.grow()
    assert len(pool.workers) == 2


def test_a_lost_spare_hands_its_calls_back_and_is_not_replaced(make_pool, pid_of):
    pool = bring_up(make_pool(1, max_size=2))
    pool.grow()
    pid = pid_of(pool.workers[1].actor)
    for number in range(2):
        pool.submit(number, "add", number, 0.5)
    list(stream(pool))
    assert len(pool.ready_workers) == 2
    for number in range(8):
        pool.submit(number, "add", number, 0.2)
    assert pool.workers[1].calls
    os.kill(pid, signal.SIGKILL)
    assert sorted(done.value for done in stream(pool)) == list(range(8))
    assert len(pool.workers) == 1 and pool.lost == 1


def test_a_call_that_hangs_loses_its_workers_and_is_given_up_and_the_others_are_not(make_pool, pid_of):
    pool = make_pool(1, retry_policy=RetryPolicy(deadline_s=2.0, tries=2))
    pid_of(pool.workers[0].actor)
    pool.submit("slow", "add", 1, 600.0)
    for number in range(3):
        pool.submit(number, "add", number)
    results = {done.key: done.value for done in stream(pool)}
    assert {number: results[number] for number in range(3)} == {0: 0, 1: 1, 2: 2}
    message = "adder lost 2 workers: adder-1 gave no answer to add slow in 2 s"
    assert results["slow"] == GivenUp("timeout", message)
    assert pool.lost == 2


def test_a_call_that_kills_its_workers_is_given_up_where_that_is_wanted(make_pool):
    pool = make_pool(1, retry_policy=RetryPolicy(deadline_s=60.0, tries=2))
    pool.submit("poison", "die")
    pool.submit(1, "add", 1)
    results = {done.key: done.value for done in stream(pool)}
    assert results[1] == 1 and results["poison"].kind == "unavailable" and "lost 2 workers" in results["poison"].message


def test_the_time_that_a_worker_takes_to_start_does_not_count_as_work(local_ray, by_value):
    actor = local_ray.remote(Sleeper).options(num_cpus=0)
    pool = Pool("sleeper", lambda name, index: actor.remote(), 1, 60.0, retry_policy=RetryPolicy(1.0, 1))
    pool.submit(0, "add", 5)
    assert [done.value for done in stream(pool)] == [5] and pool.lost == 0
    pool.shutdown()


def test_a_worker_starts_since_it_was_made_whatever_the_others_are_told_meanwhile(local_ray, by_value):
    kinds = [local_ray.remote(kind).options(num_cpus=0) for kind in (Adder, Sleeper)]
    pool = Pool("mixed", lambda name, index: kinds[index].remote(), 2, 60.0)
    made = [worker.since for worker in pool.workers]
    pool.wait_until(lambda: pool.workers[0].ready)
    pool.broadcast("add", 1)
    quick, slow = pool.status()
    assert slow.phase == "starting" and slow.since == made[1] and quick.since > made[0]
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


@pytest.mark.exhaustive  # Ray copies the whole environment first
def test_a_rewards_workers_have_packages_of_their_own(local_ray, by_value, tiny, wheel):
    config = tiny("nft", f"rewards.clip.pool.pip=[{wheel}]")
    pool = derive(config, 2, 0).reward_pools[1]
    worker = make_reward_worker(config, derive(config, 2, 0), replace(pool, cpus=0.01), None)
    found = worker.__ray_call__.remote(lambda _: __import__("own_dependency").VALUE)
    assert pool.pip == (str(wheel),) and local_ray.get(found, timeout=300) == 42
    local_ray.kill(worker)
    assert importlib.util.find_spec("own_dependency") is None


@pytest.mark.exhaustive  # Ray copies the whole environment first
def test_packages_that_cannot_be_installed_are_one_sentence(local_ray, by_value, tmp_path):
    missing = {"packages": [f"{tmp_path}/nowhere-1.0-py3-none-any.whl"]}
    actor = local_ray.remote(Adder).options(num_cpus=0, runtime_env={"pip": missing})
    pool = Pool("reward adder", lambda name, index: actor.remote(name), 1, 300.0)
    pool.submit(0, "add", 1)
    with pytest.raises(UserError, match="^reward adder-0: its packages cannot be installed .*nowhere.*pool.pip$"):
        list(stream(pool))
    pool.shutdown()
