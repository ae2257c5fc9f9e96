"""Shares cores or GPUs out between samplers and learners that work at the same time (`loop.ahead`)."""

import math

from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError

Pair = tuple[int, int]  # of samplers and of learners


def step_time(work: tuple[float, float], pieces: Pair, workers: Pair, ahead: bool = True) -> float:
    """Return how long a step takes: as the slower of samplers and learners where they work at the same time, else as
    both together.

    `work` is what one worker of each kind would take for all of a step, and `pieces` is how many chunks a step has, and
    how many micro-batches an update: a worker does one at a time.
    """
    times = [time / cut * math.ceil(cut / min(n, cut)) for time, cut, n in zip(work, pieces, workers, strict=True)]
    return max(times) if ahead else sum(times)


def best_split(work: tuple[float, float], pieces: Pair, places: int) -> Pair:
    """Return the numbers of samplers and learners, `places` together at most, whose step is shortest.

    Of equally good ones it takes the fewest workers.
    """
    pairs = [(s, n) for s in range(1, min(places - 1, pieces[0]) + 1) for n in range(1, min(places - s, pieces[1]) + 1)]
    return min(pairs, key=lambda pair: (step_time(work, pieces, pair), sum(pair)))


def advice(work: tuple[float, float], pieces: Pair, now: Pair, seconds: float) -> str | None:
    """Say which other split of the same workers would make steps of `seconds` a tenth shorter or more, if one would."""
    best = best_split(work, pieces, sum(now))
    gain = step_time(work, pieces, best) / step_time(work, pieces, now)
    if gain > 0.9:
        return None
    return (
        f"{now[0]} samplers take {work[0] / now[0]:.3g} s for a step and {now[1]} learners {work[1] / now[1]:.3g} s: "
        f"with cluster.samplers {best[0]} and cluster.learners {best[1]} a step would take about {gain * seconds:.3g} "
        f"s instead of {seconds:.3g}"
    )


def beside(config: RunConfig, places: int, unit: str, pieces: Pair, work: float) -> Pair:
    """Return the numbers of samplers and learners on `places` cores or GPUs, as `unit` says.

    `work` is what learners do over what samplers do in a step. Raises UserError where they cannot be beside each other.
    Cores may hold more than one worker each, which costs speed only.
    """
    samplers, learners = config.cluster.samplers, config.cluster.learners
    if places < 2:
        raise UserError(
            f"loop.ahead is 1, and among the {unit} there is room for one worker (cluster.threads is "
            f"{config.cluster.threads}): a sampler and a learner would take turns there; set loop.ahead to 0"
        )
    if unit == "GPUs" and (samplers or 1) + (learners or 1) > places:
        raise UserError(
            f"loop.ahead is 1, and {samplers or 1} samplers and {learners or 1} learners cannot be beside each other "
            f"on {places} GPUs; lower cluster.samplers or cluster.learners, or set loop.ahead to 0"
        )
    if samplers is None and learners is None:
        return best_split((1.0, work), pieces, places)
    return samplers or max(1, min(places - learners, pieces[0])), learners or max(1, min(places - samplers, pieces[1]))
