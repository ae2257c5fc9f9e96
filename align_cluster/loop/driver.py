"""The run on one page: plan groups, draw, score, credit, update, publish; evaluate before, between and after."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from align_cluster.algorithms import ALGORITHMS
from align_cluster.cluster.placement import cluster, plan_run, reserve, resources
from align_cluster.cluster.preload import Preload
from align_cluster.config.check import check_prompts
from align_cluster.config.load import dump
from align_cluster.config.run import RunConfig
from align_cluster.files import storage, write_json, write_text
from align_cluster.loop.advantages import AdvantageEstimator
from align_cluster.loop.checkpoints import CheckpointManager
from align_cluster.loop.clock import Clock
from align_cluster.loop.critic_advantages import CriticAdvantageEstimator, save_critic
from align_cluster.loop.evaluation import Evaluation
from align_cluster.loop.heartbeat import Heartbeat
from align_cluster.loop.preempt import preemptible
from align_cluster.loop.requests import plan_chunks, training_request
from align_cluster.loop.resume import StartingPoint, starting_point
from align_cluster.loop.summary import Results, step_metrics, summary
from align_cluster.loop.workers import WorkerGroup
from align_cluster.observe.guards import Guard
from align_cluster.observe.progress import Progress, table
from align_cluster.observe.report import write_report
from align_cluster.observe.sinks import MetricWriter
from align_cluster.prompts import PROMPTS
from align_cluster.rewards.mix import silent
from align_cluster.types import Prompt

STAGES = ["rollout", "reward", "update", "evaluate"]


def train(
    config: RunConfig, out: Path, resume: str | None = None, alone: bool = False, preload: Preload | None = None
) -> Path:
    """Run one alignment and return its run directory.

    `resume` is "auto", a run directory or a checkpoint to go on from; see `resume.starting_point`. For `alone` see
    `preemptible`, for `preload` see `cluster`. Raises UserError for what the user can mend, and Preempted on SIGTERM.
    """
    prompts, held_out = (PROMPTS[source.kind](source).load() for source in (config.prompts, config.evaluate.prompts))
    check_prompts(config, prompts, held_out)
    with (
        Progress(config.steps, STAGES) as bars,
        starting_point(config, out, resume, bars.note) as start,
        storage(start.run.path),
    ):
        run = start.run
        if start.finished(config):
            bars.note(f"{run.path} has finished its {config.steps} steps; set steps to more to go on")
            return run.path
        with cluster(config.cluster, preload), preemptible(alone):
            plan = plan_run(start.settled(config), *resources())
            config = plan.config
            with reserve(plan) as places, WorkerGroup(config, plan, places, bars.stage) as workers:
                write_text(run.config, dump(config))
                pools = f"{plan.samplers} samplers, {plan.reward_workers} reward workers, {plan.learners} learner ranks"
                bars.note(f"{pools} -> {run.path}")
                facts = align(config, prompts, held_out, start, workers, bars)
                write_json(run.summary, facts)
                write_report(run.path)
    bars.console.print(table(facts, run.path))
    return run.path


def align(
    config: RunConfig,
    prompts: list[Prompt],
    held_out: list[Prompt],
    start: StartingPoint,
    workers: WorkerGroup,
    bars: Progress,
) -> dict[str, Any]:
    """Run the loop, from the first evaluation (or where the run stood) to the LoRA; return the run's summary."""
    run, clock, guard, results = start.run, Clock(), Guard(config.guard, config.trained), Results()
    rollouts, learner, weights = workers.rollouts, workers.learner, workers.weights
    has_critic = ALGORITHMS[config.algorithm.kind](config.algorithm).critic is not None
    estimator = (CriticAdvantageEstimator if has_critic else AdvantageEstimator)(config)
    checkpoints = CheckpointManager(config, start.store, workers, estimator, clock, guard, bars.note)
    heartbeat = Heartbeat(run.path, config, clock, workers)
    with MetricWriter(run.path, start.state and start.steps, bars.note) as metrics, checkpoints, heartbeat:
        evaluation = Evaluation(config, held_out, workers, run, metrics, clock)
        if start.state:
            results = checkpoints.restore(start.state)
            bars.resume(metrics.first)
        else:
            results.before = evaluation.first()
            workers.ranks.ready()
        weights.publish("behaviour")
        for step in range(start.steps, config.steps):
            clock.next_step(step + 1)
            chunks = plan_chunks(config, prompts, step)
            drawn_for = [prompt for chunk in chunks for prompt in chunk.prompts]
            with clock.stage("encode"):
                workers.conditions.encode(drawn_for)
            with clock.stage("explore") if config.exploration else nullcontext():
                explored = workers.conditions.explore(drawn_for)
            with clock.at("draw"):
                rollout = rollouts.draw(chunks, training_request(config, step, weights.version))
            clock.add_all(rollout.seconds)
            drawn = rollout.drawn
            with clock.stage("credit"):
                credit = estimator.assign(drawn, learner.values(drawn) if has_critic else None)
            with clock.stage("update"):
                trained = learner.update(step, drawn, credit)
                observed = estimator.observe(drawn, trained)
            results.check_ratio(trained, config.learner.ratio_tolerance)
            with clock.stage("publish"):
                sync = weights.publish("behaviour")
            row = explored | observed | rollout.metrics
            row |= step_metrics(config, drawn, credit, trained, clock, sync)
            metrics.write(step + 1, row)
            bars.step(step + 1, row)
            guard.require_scores(step + 1, silent([item.scores for item in drawn], config.rewards), config.rewards)
            if alarm := guard.rollback_wanted(step + 1, row, bars.note):
                checkpoints.roll_back(alarm)
                weights.publish("behaviour")
            checkpoints.step(step + 1, metrics, evaluation.between(step + 1), results)
        sync, results.after = evaluation.last()
        if has_critic:
            save_critic(run, config, workers.ranks.critic_state(), estimator)
    lora = weights.save(sync, run.lora)
    return summary(config, results, workers, clock, sync, lora, checkpoints.resumed)
