"""The work of samplers against that of learners, by which cores or GPUs are shared out where both work at once."""

from align_cluster.config.plan import Rows, derive
from align_cluster.config.run import RunConfig
from align_cluster.planner.memory import measure
from align_cluster.planner.report import image_flops


def learner_work(config: RunConfig, cores: int, gpus: int, rows: Rows) -> float:
    """Return what learners do over what samplers do in a step, in FLOPs, where a plan needs it; else 1.

    A plan needs it where `loop.ahead` is 1 and the settings leave the numbers of samplers and learners open. That takes
    seconds. Raises UserError where the settings of the model cannot be read.
    """
    plan = derive(config, cores, gpus, rows)
    if not plan.config.loop.ahead or config.cluster.samplers or config.cluster.learners:
        return 1.0
    sizes = measure(plan.config, plan, "cuda" if gpus else "cpu", alternatives=False)
    flops = image_flops(plan.config, plan, sizes)
    return flops["update"] / flops["rollout"]
