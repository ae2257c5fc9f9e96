"""The run on one page: plan groups, draw, score, credit, update, publish; evaluate before, between and after."""

from pathlib import Path
from typing import Any

import numpy as np

from align_cluster.backbones import BACKBONES
from align_cluster.cluster.placement import cluster, reserve, resources
from align_cluster.config.check import check_prompts
from align_cluster.config.load import dump
from align_cluster.config.plan import Plan, derive
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.files import storage, write_json, write_text
from align_cluster.loop.advantages import Creditor
from align_cluster.loop.checkpoints import Keeper
from align_cluster.loop.clock import Clock
from align_cluster.loop.critic_advantages import CriticCreditor, save_critic
from align_cluster.loop.evaluation import Evaluation
from align_cluster.loop.heartbeat import Watch
from align_cluster.loop.preempt import preemptible
from align_cluster.loop.resume import Place, place
from align_cluster.loop.summary import step_metrics, summary
from align_cluster.loop.workers import Crew
from align_cluster.observe.progress import Progress, table
from align_cluster.observe.report import write_report
from align_cluster.observe.sinks import MetricWriter
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.groups import plan_step
from align_cluster.types import Chunk, Prompt

STAGES = ["rollout", "reward", "update", "evaluate"]


def train(config: RunConfig, out: Path, resume: str | None = None, alone: bool = False) -> Path:
    """Run one alignment and return its run directory. Raises UserError for what the user can mend, Preempted on
    SIGTERM. `resume`: "auto", a run directory or a checkpoint to go on from, see `resume.place`; `alone`: see
    `preemptible`."""
    prompts, held_out = (PROMPTS[source.kind](source).load() for source in (config.prompts, config.evaluate.prompts))
    check_prompts(config, prompts, held_out)
    with (
        Progress(config.steps, STAGES) as bars,
        place(config, out, resume, bars.note) as begun,
        storage(begun.run.path),
    ):
        run = begun.run
        if begun.finished(config):
            bars.note(f"{run.path} has finished its {config.steps} steps; set steps to more to go on")
            return run.path
        with cluster(config.cluster), preemptible(alone):
            plan = derive(config, *resources())
            with reserve(plan) as places, Crew(config, plan, places, bars.stage) as crew:
                write_text(run.config, dump(config))
                pools = f"{plan.samplers} samplers, {plan.reward_workers} reward workers, {plan.learners} learner ranks"
                bars.note(f"{pools} -> {run.path}")
                facts = align(config, prompts, held_out, begun, crew, bars)
                write_json(run.summary, facts)
                write_report(run.path)
    bars.console.print(table(facts, run.path))
    return run.path


def align(
    config: RunConfig, prompts: list[Prompt], held_out: list[Prompt], begun: Place, crew: Crew, bars: Progress
) -> dict[str, Any]:
    """The loop, from the first evaluation (or where the run stood) to the LoRA; returns the run's summary."""
    run, clock = begun.run, Clock()
    creditor = (CriticCreditor if crew.algorithm.critic else Creditor)(config)
    keeper = Keeper(config, begun.store, crew, creditor, clock, bars.note)
    watch = Watch(run.path, config, clock, crew)
    with MetricWriter(run.path, begun.state and begun.steps, bars.note) as metrics, keeper, watch:
        evaluation = Evaluation(config, held_out, crew, run, metrics)
        if begun.state:
            before, self_check = keeper.restore(begun.state)
            bars.resume(metrics.first)
        else:
            with clock.stage("evaluate"):
                before, self_check = evaluation.first(), None
            crew.learners.ready()
        crew.publish("behaviour")
        for step in range(begun.steps, config.steps):
            clock.next_step(step + 1)
            chunks = plan_chunks(config, prompts, step, crew.plan)
            explored = {}
            if config.exploration:
                with clock.stage("explore"):
                    explored = crew.explore([chunk.prompt for chunk in chunks])
            with clock.at("draw"):
                drawn, times = crew.draw(chunks, crew.request(step))
            for stage, seconds in times.items():
                clock.add(stage, seconds)
            with clock.stage("credit"):
                values = crew.values(drawn) if crew.algorithm.critic else None
                learned = creditor.assign(step, drawn, values)
            with clock.stage("update"):
                trained = crew.update(step, drawn, learned)
                explored |= creditor.observe(step, drawn, trained)
            self_check = self_check or check_ratio(config, trained)
            with clock.stage("publish"):
                sync = crew.publish("behaviour")
            values = explored | crew.scored | step_metrics(config, drawn, learned, trained, clock.step, sync)
            metrics.write(step + 1, values)
            bars.step(step + 1, values)
            if keeper.roll_back_if_needed(step + 1, values):
                crew.publish("behaviour")
            score = None
            if evaluation.due(step + 1):
                with clock.stage("evaluate"):
                    score = evaluation.between(step + 1)
            keeper.step(step + 1, metrics, score, before, self_check)
        with clock.stage("evaluate"):
            sync, after = evaluation.last(config.steps)
        if crew.algorithm.critic:
            save_critic(run, config, crew.learners.critic_state(), creditor)
    lora = BACKBONES[config.backbone.kind](config.backbone).save_lora(crew.adapter(sync), run.lora)
    return summary(config, evaluation.headline, before, after, crew, clock, sync, lora, self_check, keeper.resumed)


def plan_chunks(config: RunConfig, prompts: list[Prompt], step: int, plan: Plan) -> list[Chunk]:
    """What a training step draws."""
    return plan_step(
        prompts,
        config.seed,
        step,
        config.prompts_per_step,
        config.rollout.group_size,
        plan.chunk,
        config.conditions,
        config.rollout.same_noise,
    )


def check_ratio(config: RunConfig, trained: dict[str, tuple[float, float]]) -> dict[str, float] | None:
    """Invariant: with unchanged weights the learner's log-probs equal the rollout's. None where there are none."""
    if "first_log_ratio" not in trained:
        return None
    largest = trained["first_log_ratio"][1]
    if not np.isfinite(largest) or largest > config.learner.ratio_tolerance:
        raise UserError(
            "self-check failed: before the first update the learner's log-probs differ from the rollout's by "
            f"{largest:.2e} (learner.ratio_tolerance is {config.learner.ratio_tolerance:g}): leave "
            "learner.micro_batch unset so that both batch alike, or set backbone.precision: fp32"
        )
    return {"max_abs_log_ratio": largest}
