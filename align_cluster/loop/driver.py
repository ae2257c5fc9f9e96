"""The run on one page: plan groups, draw, score, credit, update, publish; evaluate before, between and after."""

import time
from pathlib import Path
from typing import Any

from align_cluster.algorithms import ALGORITHMS
from align_cluster.cluster import sealing
from align_cluster.cluster.placement import cluster, plan_run, reserve, resources
from align_cluster.cluster.preload import Preload
from align_cluster.config.check import check_prompts
from align_cluster.config.load import dump
from align_cluster.config.plan import Plan
from align_cluster.config.run import RunConfig
from align_cluster.errors import counted
from align_cluster.files import storage, write_json, write_text
from align_cluster.interrupts import begun, interruptible, uninterrupted
from align_cluster.loop.activity import Activity
from align_cluster.loop.advantages import AdvantageEstimator
from align_cluster.loop.ahead import StepDrawer
from align_cluster.loop.checkpoints import CheckpointManager
from align_cluster.loop.clock import Clock
from align_cluster.loop.critic_advantages import CriticAdvantageEstimator, save_critic
from align_cluster.loop.evaluation import Evaluation
from align_cluster.loop.heartbeat import Heartbeat
from align_cluster.loop.inputs import inputs
from align_cluster.loop.resume import StartingPoint, starting_point
from align_cluster.loop.summary import Results, step_metrics, summary
from align_cluster.loop.tracking import feeds, live
from align_cluster.loop.workers import WorkerGroup
from align_cluster.observe.guards import Guard
from align_cluster.observe.progress import Progress
from align_cluster.observe.report import write_report
from align_cluster.observe.sinks import MetricWriter
from align_cluster.prompts import PROMPTS
from align_cluster.rewards.mix import silent
from align_cluster.types import Prompt

STAGES = {"rollout": "chunks", "reward": "chunks", "update": "", "evaluate": "chunks"}  # and what each counts in


def train(
    config: RunConfig,
    out: Path,
    resume: str | None = None,
    preload: Preload | None = None,
    began: float | None = None,
) -> Path:
    """Run one alignment and return its run directory.

    `resume` is "auto", a run directory or a checkpoint to go on from; see `resume.starting_point`. For `preload` see
    `cluster`. `began` is when the command began, by the monotonic clock (None: now). Raises UserError for what the user
    can mend, and Preempted on SIGTERM.
    """
    begun()
    began = time.monotonic() if began is None else began
    prompts, held_out = (PROMPTS[source.kind](source).load() for source in (config.prompts, config.evaluate.prompts))
    check_prompts(config, prompts, held_out)
    with (
        interruptible(),
        Progress(config.steps, STAGES, began=began, run=config.name) as bars,
        starting_point(config, out, resume, bars.note, inputs(config, prompts, held_out)) as start,
        storage(start.run.path),
    ):
        run = start.run
        bars.named(run.path.name)
        if start.finished(config):
            bars.note(f"{run.path} has finished its {config.steps} steps; set steps to more to go on")
            return run.path
        bars.phase(f"joining the Ray at {config.cluster.address}" if config.cluster.address else "starting Ray")
        with cluster(config.cluster, preload):
            sealing.check_workers(config)
            plan = plan_run(start.settled(config), *resources(config.cluster))
            config = plan.config
            with reserve(plan) as places, WorkerGroup(config, plan, places, bars.stage) as workers:
                write_text(run.config, dump(config))
                bars.phase(f"starting {pools(plan)} -> {run.path}")
                facts = align(config, prompts, held_out, start, workers, bars)
                write_json(run.summary, facts)
                write_report(run.path)
    bars.finish(facts, run.path)
    return run.path


def pools(plan: Plan) -> str:
    """Return a run's workers in words."""
    counts = ((plan.samplers, "sampler"), (plan.reward_workers, "reward worker"), (plan.learners, "learner rank"))
    return ", ".join(counted(*pair) for pair in counts)


def align(
    config: RunConfig,
    prompts: list[Prompt],
    held_out: list[Prompt],
    start: StartingPoint,
    workers: WorkerGroup,
    bars: Progress,
) -> dict[str, Any]:
    """Run the loop, from the first evaluation (or where the run stood) to the LoRA; return the run's summary."""
    run, clock, guard, results = start.run, Clock(bars.began), Guard(config.guard, config.trained), Results()
    learner, weights, steps = workers.learner, workers.weights, StepDrawer(config, prompts, workers, clock)
    has_critic = ALGORITHMS[config.algorithm.kind](config.algorithm).critic is not None
    estimator = (CriticAdvantageEstimator if has_critic else AdvantageEstimator)(config)
    checkpoints = CheckpointManager(config, start.store, start.inputs, workers, estimator, clock, guard, bars.note)
    trackers = feeds(config, run, start.state is not None, bars.note)
    metrics = MetricWriter(run.path, start.state and start.steps, bars.note, trackers)
    heartbeat = Heartbeat(run.path, config, clock, workers, lambda: live(config, metrics, clock, workers, guard))
    activity = Activity(workers, clock, run, bars.note)
    with metrics, checkpoints, heartbeat:
        evaluation = Evaluation(config, held_out, workers, run, metrics, clock, bars.note)
        if start.state:
            bars.phase(f"going on after step {start.steps} of {config.steps}")
            results = checkpoints.restore(start.state)
            bars.resume(start.steps, metrics.first)
        else:
            bars.phase(f"scoring the base model: {counted(evaluation.images, 'image')}")
            results.before = evaluation.first()
            bars.phase("waiting for the learner's model")
            workers.ranks.ready()
        weights.publish("behaviour")
        if start.state and not start.state.evaluated:
            checkpoints.step(start.steps, metrics, evaluation.between(start.steps), results)
        for step in range(start.steps, config.steps):
            clock.next_step(step + 1)
            rollout = steps.take(step)  # the samplers are then at work on the step after it, if loop.ahead says so
            drawn = rollout.drawn
            with clock.stage("credit"):
                credit = estimator.assign(drawn, learner.values(drawn) if has_critic else None)
            with clock.stage("update"):
                workers.report("update", 0, 1)
                trained = learner.update(step, drawn, credit)
                workers.report("update", 1, 1)
                observed = estimator.observe(drawn, trained)
            results.check_ratio(trained, config.learner.ratio_tolerance)
            with clock.stage("publish"):
                sync = weights.publish("behaviour")
            row = observed | rollout.metrics
            row |= step_metrics(config, drawn, credit, trained, clock, sync)
            row |= activity.measure(step + 1, config.images_per_step)
            with uninterrupted():  # a step's row and the state after it belong together
                metrics.write(step + 1, row)
                alarm = guard.rollback_wanted(step + 1, row, bars.note)
                checkpoints.finished(step + 1, metrics, results)
            bars.step(step + 1, row)
            guard.require_scores(step + 1, silent([item.scores for item in drawn], config.rewards), config.rewards)
            if alarm:
                checkpoints.roll_back(alarm)
                steps.drop()
                weights.publish("behaviour")
            checkpoints.step(step + 1, metrics, evaluation.between(step + 1), results)
        bars.phase(f"scoring the result: {counted(evaluation.images, 'image')}")
        sync, results.after = evaluation.last()
        if has_critic:
            save_critic(run, config, workers.ranks.critic_state(), estimator)
    lora = weights.save(sync, run.lora)
    return summary(config, results, workers, clock, sync, lora, checkpoints.resumed)
