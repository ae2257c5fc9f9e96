"""How many rows fit into a GPU at once, for the batches that a run leaves open."""

from align_cluster.config.plan import ROWS, Rows, derive
from align_cluster.config.run import RunConfig
from align_cluster.planner.fit import SPARE, fullest_gpu, learner_memory, sampler_memory
from align_cluster.planner.memory import measure


def rows_that_fit(config: RunConfig, cores: int, gpus: int, memory: float) -> Rows:
    """Return the rows that samplers and learners hold at once on GPUs of `memory` bytes; at least one each.

    What a run takes with one row is counted from its networks' settings, which takes seconds. Activations grow with the
    rows and share what is left. Raises UserError where the settings of the model cannot be read.
    """
    if config.rollout.chunk and config.learner.micro_batch and config.learner.fold:
        return Rows()  # nothing is open
    plan = derive(config, cores, gpus, Rows(1, 1))
    sizes = measure(plan.config, plan, "cuda", alternatives=False)
    left = (1 - SPARE) * memory - fullest_gpu(plan.config, plan, sizes)
    share = max(0.0, left if plan.apart else left / 2)
    drawing = plan.together * sampler_memory(plan.config, plan, sizes).activations / plan.chunk
    training = learner_memory(plan.config, plan, sizes).activations / plan.rows_per_pass
    return Rows(*(min(ROWS, 1 + int(share / one_row)) for one_row in (drawing, training)))
