from pathlib import Path

import pytest

from align_cluster.config.load import load
from align_cluster.config.plan import ROWS, Rows, derive
from align_cluster.planner.batches import rows_that_fit
from align_cluster.planner.fit import CONTEXT, GIB, fits, fullest_gpu
from align_cluster.planner.memory import measure

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.slow
def test_open_batches_are_as_large_as_a_gpus_memory_allows_and_no_larger():
    config = load(CONFIGS / "quickstart.yaml", [])
    single = derive(config, 8, 1, Rows(1, 1))
    least = fullest_gpu(single.config, single, measure(single.config, single, "cuda"))
    few, some, many = (rows_that_fit(config, 8, 1, (least + room * GIB) / 0.95) for room in (0.0, 0.05, 50.0))
    assert few == Rows(1, 1) and many == Rows(ROWS, ROWS)
    assert 1 < some.draw <= ROWS and 1 < some.train < ROWS
    plan = derive(config, 8, 1, some)
    assert fits(fullest_gpu(plan.config, plan, measure(plan.config, plan, "cuda")), (least + 0.05 * GIB) / 0.95)


def test_stated_batches_stay_and_nothing_is_counted():
    stated = ["rollout.chunk=12", "learner.micro_batch=4", "learner.fold=1"]
    config = load(CONFIGS / "quickstart.yaml", [*stated, "backbone.path=/nowhere"])
    assert rows_that_fit(config, 8, 1, CONTEXT) == Rows()
