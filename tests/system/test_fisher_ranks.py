"""The Fisher probe in the middle of updates of the real DeepSpeed engine."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from .ranks import ranks

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("fisher_worker.py")
STAGES = ("0", "2")
CASES = [f"{stage}:{kind}" for stage in STAGES for kind in ("plain", "probe")]


@pytest.fixture(scope="module")
def left(tmp_path_factory, preload) -> dict[int, list[dict[str, list[dict]]]]:
    """World -> for each rank: case -> what each update left behind."""
    folder = tmp_path_factory.mktemp("fisher")
    with (
        ranks(preload, SCRIPT, 1, folder / "1", *CASES) as alone,
        ranks(preload, SCRIPT, 2, folder / "2", *CASES) as both,
    ):
        assert [process.wait(timeout=300) for process in alone + both] == [0, 0, 0]
    return {
        world: [pickle.loads((folder / f"{world}.{rank}").read_bytes()) for rank in range(world)] for world in (1, 2)
    }


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_agree_on_an_eigenvalue_and_equal_one_rank_with_all_samples(left, stage):
    alone, first, second = (rank[f"{stage}:probe"] for rank in left[1] + left[2])
    for one, two, other in zip(alone, first, second, strict=True):
        assert two["found"].lambda_max == other["found"].lambda_max > 0
        np.testing.assert_array_equal(two["vector"], other["vector"])
        assert two["found"].lambda_max == pytest.approx(one["found"].lambda_max, rel=1e-4)
        norms = [rank["found"].score_norm for rank in (two, other)]
        assert max(norms) == pytest.approx(one["found"].score_norm, rel=1e-4) and norms[0] != norms[1]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_training_goes_on_bit_by_bit_as_without_a_probe(left, world, stage):
    for rank in left[world]:
        start = None
        for plain, probed in zip(rank[f"{stage}:plain"], rank[f"{stage}:probe"], strict=True):
            assert plain["found"] is None and probed["found"].lambda_max > 0
            assert plain["norm"] == probed["norm"] > 0.01
            for name, value in plain["values"].items():
                np.testing.assert_array_equal(value, probed["values"][name])
                assert start is None or not np.array_equal(value, start[name])
            start = plain["values"]
