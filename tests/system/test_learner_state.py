"""The state of the real DeepSpeed learner, Adam's moments and all, goes from any ranks and ZeRO stage to any others."""

import pickle
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from align_cluster.cluster.preload import Preload
from align_cluster.learner.state import Snapshot

from ..cases import each
from .ranks import ranks

SCRIPT = Path(__file__).with_name("state_worker.py")
SAVED = ["2-2-nft", "2-1-ppo"]
MOVES = [
    *(("2-2-nft", 2, 2), ("2-2-nft", 0, 1), ("2-2-nft", 1, 1), ("2-2-nft", 2, 4)),
    *(("2-1-ppo", 2, 2), ("2-1-ppo", 2, 1), ("0-1-nft", 2, 2)),
]
# Stage 3 gathers each weight for each use, and ranks that share two cores wait for each other: these take minutes.
STAGE_3 = [("2-2-nft", 3, 2), ("3-2-nft", 3, 2), ("3-2-nft", 2, 1), ("3-2-nft", 3, 4)]


def label(saved: str, stage: int, world: int) -> str:
    return f"{stage}-{world}-{saved[4:]}-from-{saved}"


def run(preload: Preload, folder: Path, jobs: dict[int, list[str]]) -> None:
    """Run the jobs of each number of ranks, all at once."""
    with ExitStack() as stack:
        started = [
            process
            for world, names in jobs.items()
            for process in stack.enter_context(ranks(preload, SCRIPT, world, folder, *names))
        ]
        assert not any(process.wait(timeout=600) for process in started)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, preload) -> Path:
    """Where the states of all cases are."""
    folder = tmp_path_factory.mktemp("states")
    run(preload, folder, {1: ["save:2:ppo", "save:0:nft"], 2: ["save:2:nft"]})
    move(preload, folder, MOVES)
    return folder


def move(preload: Preload, folder: Path, moves: list[tuple[str, int, int]]) -> None:
    """Restore each saved state in another job, and take one step there."""
    jobs: dict[int, list[str]] = {}
    for saved, stage, world in moves:
        jobs.setdefault(world, []).append(f"load:{stage}:{saved[4:]}:{saved}")
    for world, names in jobs.items():
        run(preload, folder, {world: names})


def states(folder: Path, name: str) -> tuple[Snapshot, Snapshot]:
    return pickle.loads((folder / name).read_bytes())


def assert_same(first: Snapshot, second: Snapshot) -> None:
    assert first.counts == second.counts
    assert [tensor.name for tensor in first.manifest.tensors] == [tensor.name for tensor in second.manifest.tensors]
    for name, value in first.tensors().items():
        np.testing.assert_array_equal(value, second.tensors()[name], err_msg=name)


@pytest.mark.slow
@each("name", SAVED)
def test_a_state_holds_adapters_average_and_moments_that_moved(folder, name):
    before, after = states(folder, name)
    assert before.counts["updates"] == before.counts["steps"] == 4
    assert after.counts["updates"] == after.counts["steps"] == 6
    kinds = {tensor.name.split("/")[0] for tensor in before.manifest.tensors}
    assert kinds == {"adapter", "ema", "exp_avg", "exp_avg_sq"} | ({"critic"} if "ppo" in name else set())
    for kind in kinds:
        values = [value for key, value in before.tensors().items() if key.startswith(f"{kind}/")]
        assert any(np.abs(value).sum() > 0 for value in values)


@pytest.mark.slow
@each(("saved", "stage", "world"), MOVES)
def test_what_is_restored_is_what_was_saved_to_the_last_bit(folder, saved, stage, world):
    assert_same(states(folder, saved)[0], states(folder, label(saved, stage, world))[0])


@pytest.mark.slow
@each(("saved", "stage", "world"), MOVES)
def test_the_next_step_is_the_one_that_would_have_come(folder, saved, stage, world):
    assert_next(folder, saved, stage, world)


@pytest.mark.exhaustive
def test_a_state_goes_to_stage_three_and_from_it_to_any_ranks(tmp_path, preload):
    run(preload, tmp_path, {2: ["save:2:nft", "save:3:nft"]})
    move(preload, tmp_path, STAGE_3)
    for saved, stage, world in STAGE_3:
        assert_same(states(tmp_path, saved)[0], states(tmp_path, label(saved, stage, world))[0])
        assert_next(tmp_path, saved, stage, world)


def assert_next(folder: Path, saved: str, stage: int, world: int) -> None:
    """The next step is the uninterrupted one: bit by bit with the same ranks and stage, else up to rounding."""
    uninterrupted, resumed = states(folder, saved)[1], states(folder, label(saved, stage, world))[1]
    if (str(stage), str(world)) == (saved[0], saved[2]):
        assert_same(uninterrupted, resumed)
    assert uninterrupted.counts == resumed.counts
    for name, value in uninterrupted.tensors().items():
        np.testing.assert_allclose(value, resumed.tensors()[name], rtol=0, atol=1e-5, err_msg=name)
