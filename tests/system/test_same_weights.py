"""Who does the work does not show in the weights: any number of samplers, and workers that are killed on the way."""

import os
import shutil
import signal
import threading
from collections.abc import Callable

import pytest
from hooked import HookedWorkers
from ray.exceptions import RayActorError

from align_cluster.loop import driver

MOMENTS = ("before rollout", "in rollout", "in scoring", "before update", "in publish", "after publish")


def saboteur(pool_name: str, moments: tuple[str, ...], pid_of: Callable, killed: list[int]) -> type[HookedWorkers]:
    """Workers that kill one of the named pool at moments of the second step: one with work, where there is one."""

    class Saboteur(HookedWorkers):
        drawn, trained, left = 0, 0, list(moments)  # the steps that are drawn and trained

        def strike(self, moment: str, step: int, delay: float = 0.0) -> None:
            if step != 2 or moment not in self.left:
                return
            self.left.remove(moment)
            pool = self.samplers if pool_name == "samplers" else self.rewards[0]
            victim = next((worker for worker in pool.workers if worker.calls), pool.workers[0])
            try:
                killed.append(int(victim.location.split()[-1]) if victim.location else pid_of(victim.actor))
            except RayActorError:  # the strike before hit it as it started, which its pool does not know yet
                killed.append(killed[-1])
                return
            threading.Timer(delay, os.kill, [killed[-1], signal.SIGKILL]).start()

        def begin(self, chunks, request):
            self.drawn = chunks[0].step + 1
            self.strike("before rollout", self.drawn)
            return super().begin(chunks, request)

        def report(self, stage, done, total):
            super().report(stage, done, total)
            if stage == "rollout" and done:
                self.strike("in rollout" if done < total else "in scoring", self.drawn)

        def update(self, step, drawn, credit):
            self.trained = step + 1
            self.strike("before update", self.trained)
            return super().update(step, drawn, credit)

        def publish(self, source):
            self.strike("in publish", self.trained, 0.02)
            sync = super().publish(source)
            self.strike("after publish", self.trained)
            return sync

    return Saboteur


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "samplers"),
    [
        *(("nft", "cluster.samplers=1"), ("grpo", "cluster.samplers=1")),
        *(("nft", "cluster.samplers=3"), ("grpo", "cluster.max_samplers=2")),
    ],
)
def test_one_two_and_three_samplers_end_in_the_same_lora(runs, tiny, train, kind, samplers):
    """`runs` have two. With max_samplers a second one comes while the run works."""
    more = ("cluster.samplers=1",) if "max" in samplers else ()
    run = train(tiny(kind, samplers, *more))
    for key in ("lora_checksum", "before", "after", "config_hash"):
        assert run.summary[key] == runs[kind].summary[key]


@pytest.mark.slow
def test_exploration_ends_in_the_same_lora_however_its_first_phase_is_shared_out(tiny, train, short_folder):
    """Two samplers learn a prompt each, one learns both at once; nothing is taken over from the cache."""
    explore = ("exploration.kind=e2po", "exploration.conditions=3", "exploration.iterations=20")
    checksums = []
    for samplers in (1, 2):
        shutil.rmtree(short_folder / "cache" / "perturbations", ignore_errors=True)
        run = train(tiny("nft", *explore, "rollout.chunk=6", "rollout.group_size=2", f"cluster.samplers={samplers}"))
        checksums.append(run.summary["lora_checksum"])
    assert checksums[0] == checksums[1]


@pytest.mark.slow
def test_rewards_in_pools_of_their_own_end_in_the_same_lora(runs, tiny, train):
    run = train(tiny("nft", "rewards.geneval.pool.workers=2", "rewards.clip.pool.cpus=0.02"))
    for key in ("lora_checksum", "before", "after", "config_hash"):
        assert run.summary[key] == runs["nft"].summary[key]


@pytest.mark.parametrize(
    ("kind", "pool", "moments"),
    [("nft", "rewards", ("in scoring",))]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("grpo", "samplers", ("in rollout",)),
            ("nft", "samplers", MOMENTS),
            ("nft", "samplers", ("in publish",)),
            ("grpo", "rewards", ("before rollout", "in scoring", "after publish")),
            ("grpo", "rewards", ("before update",)),
        )
    ],
)
def test_workers_killed_at_any_moment_change_nothing(runs, tiny, train, pid_of, monkeypatch, kind, pool, moments):
    quiet, killed = runs[kind], []
    monkeypatch.setattr(driver, "WorkerGroup", saboteur(pool, moments, pid_of, killed))
    run = train(tiny(kind))
    assert len(killed) == len(moments)
    for key in ("lora_checksum", "after", "images_drawn"):
        assert run.summary[key] == quiet.summary[key]
