"""A learner rank that is killed at any moment is rebuilt from the state of the last update, and nothing shows of it."""

import os
import signal
import threading

import pytest
from hooked import HookedWorkers

from align_cluster.loop import driver


def saboteur(when: str, rank: int, pid_of, killed: list[int]) -> type[HookedWorkers]:
    """Workers that kill a learner rank in the second step: before the update, in it, after it, or as it publishes."""

    class Saboteur(HookedWorkers):
        def kill(self) -> None:
            killed.append(self.pid)
            os.kill(self.pid, signal.SIGKILL)

        def update(self, step, *args):
            if step != 1:
                return super().update(step, *args)
            self.pid = pid_of(self.ranks.ranks[rank])
            if when == "before":
                self.kill()
            if when == "in":
                threading.Timer(0.1, self.kill).start()  # an update takes longer than that
            trained = super().update(step, *args)
            if when == "after":
                self.kill()
            return trained

        def publish(self, source):
            if when == "start" and not killed:
                self.pid = pid_of(self.ranks.ranks[rank])
                self.kill()
            return super().publish(source)

    return Saboteur


CASES = [
    ("nft", "in", 0),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [("grpo", "before", 1), ("nft", "start", 1), ("grpo", "in", 1), ("ppo", "after", 0)]
    ),
    pytest.param("nft", "after", 0, marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("kind", "when", "rank"), CASES)
def test_a_rank_killed_at_any_moment_changes_nothing(runs, tiny, train, pid_of, monkeypatch, kind, when, rank):
    quiet, killed = runs[kind], []
    monkeypatch.setattr(driver, "WorkerGroup", saboteur(when, rank, pid_of, killed))
    run = train(tiny(kind))
    assert len(killed) == 1 and run.summary["workers_lost"] == 1
    for key in ("lora_checksum", "after", "images_drawn"):
        assert run.summary[key] == quiet.summary[key]


@pytest.mark.slow
def test_a_rank_that_is_lost_again_and_again_ends_the_run_and_says_why(tiny, train, pid_of, monkeypatch):
    class NoLearner(HookedWorkers):
        def update(self, *args):
            inner = self.ranks._start

            def start():
                inner()
                os.kill(pid_of(self.ranks.ranks[0]), signal.SIGKILL)

            self.ranks._start = start
            os.kill(pid_of(self.ranks.ranks[0]), signal.SIGKILL)
            return super().update(*args)

    monkeypatch.setattr(driver, "WorkerGroup", NoLearner)
    with pytest.raises(RuntimeError, match="4 learner ranks lost in a row"):
        train(tiny("nft", "evaluate.images_per_prompt=1", "evaluate.grid_every=0"))
