from pathlib import Path

from align_cluster.config.load import load
from align_cluster.config.plan import ROWS, Rows, derive
from align_cluster.planner.batches import rows_that_fit
from align_cluster.planner.fit import CONTEXT, GIB, fits, fullest_gpu
from align_cluster.planner.memory import measure

CONFIGS = Path(__file__).parents[2] / "configs"


def test_open_batches_are_as_large_as_a_gpus_memory_allows_and_no_larger():
    for name in ("quickstart", "embedded_grpo", "embedded_srpo"):
        config = load(CONFIGS / f"{name}.yaml", ["rewards.clip.pool.gpus=0"])
        single = derive(config, 8, 1, Rows(1, 1))
        least = fullest_gpu(single.config, single, measure(single.config, single, "cuda"))
        found = []
        for room in (0.0, 0.01, 0.05, 0.2, 50.0):
            memory = (least + room * GIB) / 0.95
            rows = rows_that_fit(config, 8, 1, memory)
            plan = derive(config, 8, 1, rows)
            assert fits(fullest_gpu(plan.config, plan, measure(plan.config, plan, "cuda")), memory * 1.01)
            found.append(rows)
        assert found == sorted(found, key=lambda rows: (rows.draw, rows.train)) and found[0] == Rows(1, 1)
        assert found[-1] == Rows(ROWS, ROWS) and len({(rows.draw, rows.train) for rows in found}) > 2


def test_stated_batches_stay_and_nothing_is_counted():
    stated = ["rollout.chunk=12", "learner.micro_batch=4", "learner.fold=1"]
    config = load(CONFIGS / "quickstart.yaml", [*stated, "backbone.path=/nowhere"])
    assert rows_that_fit(config, 8, 1, CONTEXT) == Rows()
