"""Decides what a step draws and how, from the settings and the step's number and nothing else."""

from align_cluster.algorithms import ALGORITHMS
from align_cluster.config.plan import chunk_bounds
from align_cluster.config.run import RunConfig
from align_cluster.prompts.groups import plan_step
from align_cluster.rollouts.sampler import DrawRequest
from align_cluster.rollouts.steps import Euler
from align_cluster.types import Chunk, Prompt


def step_seed(config: RunConfig, step: int) -> int:
    """Return the seed of one step's choices, such as which noise levels are trained."""
    return config.seed * 1_000_003 + step


def plan_chunks(config: RunConfig, prompts: list[Prompt], step: int) -> list[Chunk]:
    """Return the chunks that training step `step` draws."""
    return plan_step(
        prompts,
        config.seed,
        step,
        config.prompts_per_step,
        config.rollout.group_size,
        config.rollout.chunk,
        config.conditions,
        config.rollout.same_noise,
        chunk_bounds(config),
        config.anchored,
    )


def training_request(config: RunConfig, step: int, version: int) -> DrawRequest:
    """Say how training step `step` draws with weights number `version`."""
    rollout, window = config.rollout, config.window
    algorithm = ALGORITHMS[config.algorithm.kind](config.algorithm)
    noisy = window and window.plan(rollout.steps, step, step_seed(config, step))
    return DrawRequest(
        version=version,
        steps=rollout.steps,
        step=config.step_kind,
        guidance=rollout.guidance,
        window=noisy or algorithm.states(rollout.steps),
        means=algorithm.needs_means,
        schedule=rollout.schedule,
        exploration=config.exploration if config.conditions > 1 else None,
        path=algorithm.needs_path,
        distilled_guidance=rollout.distilled_guidance,
        offline=rollout.offline,
    )


def evaluation_request(config: RunConfig, version: int) -> DrawRequest:
    """Say how an evaluation draws with weights number `version`: by plain ODE sampling, whatever training does."""
    held_out = config.evaluate
    return DrawRequest(
        version=version,
        steps=held_out.steps or config.rollout.steps,
        step=Euler.Config(),
        guidance=held_out.guidance,
    )
