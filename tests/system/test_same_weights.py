"""Who does the work does not show in the weights: any number of samplers, and workers that are killed on the way."""

import os
import shutil
import signal
from collections.abc import Callable

import pytest

from align_cluster.loop import driver
from align_cluster.loop.crew import Crew


def saboteur(pool_name: str, pid_of: Callable, killed: list[int]) -> type[Crew]:
    """A Crew that kills a worker of the named pool in the second step, as soon as that worker has calls queued."""

    class Saboteur(Crew):
        def request(self, step):
            self.armed = step == 1
            return super().request(step)

        def draw(self, chunks, request):
            pool, inner = self.samplers if pool_name == "samplers" else self.rewards[0], self.report
            pids = {worker.name: pid_of(worker.actor) for worker in pool.workers}

            def report(stage: str, done: int, total: int) -> None:
                victim = next((worker for worker in pool.workers if worker.calls), None)
                if self.armed and victim:
                    self.armed = False
                    os.kill(pids[victim.name], signal.SIGKILL)
                    killed.append(pids[victim.name])
                inner(stage, done, total)

            self.report = report
            try:
                return super().draw(chunks, request)
            finally:
                self.report = inner

    return Saboteur


@pytest.mark.parametrize("kind", ["nft", "grpo"])
def test_one_sampler_and_two_end_in_the_same_lora(runs, tiny, train, kind):
    alone = train(tiny(kind, "cluster.samplers=1"))
    for key in ("lora_checksum", "before", "after", "config_hash"):
        assert alone.summary[key] == runs[kind].summary[key]


def test_exploration_ends_in_the_same_lora_however_its_first_phase_is_shared_out(tiny, train, short_folder):
    """Two samplers learn a prompt each, one learns both at once; nothing is taken over from the cache."""
    explore = ("exploration.kind=e2po", "exploration.conditions=3", "exploration.iterations=20")
    checksums = []
    for samplers in (1, 2):
        shutil.rmtree(short_folder / "cache" / "perturbations", ignore_errors=True)
        run = train(tiny("nft", *explore, "rollout.chunk=6", "rollout.group_size=2", f"cluster.samplers={samplers}"))
        checksums.append(run.summary["lora_checksum"])
    assert checksums[0] == checksums[1]


def test_rewards_in_pools_of_their_own_end_in_the_same_lora(runs, tiny, train):
    run = train(tiny("nft", "rewards.geneval.pool.workers=2", "rewards.clip.pool.cpus=0.02"))
    for key in ("lora_checksum", "before", "after", "config_hash"):
        assert run.summary[key] == runs["nft"].summary[key]


def test_another_seed_ends_in_another_lora(runs, tiny, train):
    assert train(tiny("nft", "seed=1")).summary["lora_checksum"] != runs["nft"].summary["lora_checksum"]


@pytest.mark.parametrize(("kind", "pool"), [("grpo", "samplers"), ("nft", "rewards")])
def test_a_worker_killed_in_the_middle_changes_nothing(runs, tiny, train, pid_of, monkeypatch, kind, pool):
    killed = []
    monkeypatch.setattr(driver, "Crew", saboteur(pool, pid_of, killed))
    run = train(tiny(kind))
    assert len(killed) == 1 and run.summary["workers_lost"] == 1
    for key in ("lora_checksum", "after", "images_drawn"):
        assert run.summary[key] == runs[kind].summary[key]
