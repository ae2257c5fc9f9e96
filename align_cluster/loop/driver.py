"""The run on one page: plan groups, draw, score, credit, update, publish; evaluate before and after."""

import time
from pathlib import Path

import numpy as np
import ray

from align_cluster.algorithms.advantage import credit
from align_cluster.backbones import BACKBONES
from align_cluster.cluster.placement import cluster, resources
from align_cluster.config.check import check_prompts
from align_cluster.config.load import config_hash, dump
from align_cluster.config.plan import derive
from align_cluster.config.run import RunConfig
from align_cluster.loop.crew import Crew
from align_cluster.loop.evaluation import Evaluation
from align_cluster.loop.summary import software, step_metrics
from align_cluster.observe.progress import Progress, table
from align_cluster.observe.report import write_report
from align_cluster.observe.rundir import RunDir, write_json, write_text
from align_cluster.observe.sinks import MetricWriter
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.groups import plan_step
from align_cluster.rewards.mix import concatenate, total
from align_cluster.types import UserError
from align_cluster.weights import view

STAGES = ["rollout", "reward", "update", "evaluate"]


def train(config: RunConfig, out: Path, progress: bool = True) -> Path:
    """Run one alignment and return its run directory. Raises UserError for what the user can mend."""
    prompts, held_out = (PROMPTS[source.kind](source).load() for source in (config.prompts, config.evaluate.prompts))
    check_prompts(config, prompts, held_out)
    began = time.perf_counter()
    with (
        cluster(config.cluster),
        Progress(config.steps, STAGES, every=None if progress else config.steps) as bars,
        Crew(config, plan := derive(config, *resources()), bars.stage) as crew,
    ):
        run = RunDir.create(out, config.name)
        write_text(run.config, dump(config))
        pools = f"{plan.samplers} samplers, {plan.reward_workers} reward workers, {plan.learners} learner ranks"
        bars.note(f"{pools} -> {run.path}")
        with MetricWriter(run.path) as metrics:
            evaluation = Evaluation(config, held_out, crew, run, metrics)
            before = evaluation.score(0)
            evaluation.grid(0)
            crew.learners.ready()
            crew.publish("behaviour")
            spent = {stage: 0.0 for stage in ("rollout", "reward", "credit", "update", "publish", "evaluate")}
            self_check = None
            for step in range(config.steps):
                chunks = plan_step(
                    prompts, config.seed, step, config.prompts_per_step, config.rollout.group_size, plan.chunk
                )
                indices = crew.algorithm.record_indices(config.rollout.steps, config.seed * 1_000_003 + step)
                drawn, times = crew.draw(chunks, crew.request(indices))

                clock = time.perf_counter()
                scores = concatenate([item.scores for item in drawn])
                rewards, valid = total([item.scores for item in drawn], config.rewards)
                shape = (config.prompts_per_step, config.rollout.group_size)
                learned = credit(rewards.reshape(shape), valid.reshape(shape), config.advantage)
                times["credit"] = time.perf_counter() - clock

                clock = time.perf_counter()
                bars.stage("update", 0, 1)
                trained = crew.update(step, drawn, learned, valid)
                bars.stage("update", 1, 1)
                times["update"] = time.perf_counter() - clock
                if step == 0:
                    self_check = check_ratio(config, trained)

                clock = time.perf_counter()
                manifest, _, receipts, adopted = crew.publish("behaviour")
                times["publish"] = time.perf_counter() - clock

                for stage, seconds in times.items():
                    spent[stage] += seconds
                values = step_metrics(config, drawn, scores, learned, trained, times, manifest, adopted)
                metrics.write(step + 1, values)
                bars.step(step + 1, values)
                clock = time.perf_counter()
                if evaluation.due(step + 1):
                    bars.stage("evaluate", 0, 1)
                    crew.publish("evaluation")
                    evaluation.run(step + 1)
                    crew.publish("behaviour")
                    bars.stage("evaluate", 1, 1)
                spent["evaluate"] += time.perf_counter() - clock
            manifest, buffer, *_ = crew.publish("evaluation")
            after = evaluation.score(config.steps)
            evaluation.grid(config.steps)
        state = ray.get(buffer)
        state = {tensor.name: view(state, tensor) for tensor in manifest.tensors}
        lora = BACKBONES[config.backbone.kind](config.backbone).save_lora(state, run.lora)
        wall = time.perf_counter() - began
        summary = {
            "name": config.name,
            "seed": config.seed,
            "steps": config.steps,
            "headline": evaluation.headline,
            "before": before,
            "after": after,
            "images_drawn": crew.images_drawn,
            "images_per_s": crew.images_drawn / wall,
            "wall_seconds": wall,
            "stage_seconds": {**spent, "start and rest": wall - sum(spent.values())},
            "lora_path": str(lora),
            "lora_checksum": manifest.checksum,
            "workers_lost": crew.samplers.lost + crew.rewards.lost,
            "self_check": self_check,
            "config_hash": config_hash(config),
            "versions": software(),
        }
        write_json(run.summary, summary)
        write_report(run.path)
    bars.console.print(table(summary, run.path))
    return run.path


def check_ratio(config: RunConfig, trained: dict[str, tuple[float, float]]) -> dict[str, float] | None:
    """Invariant 6: with unchanged weights the learner's log-probs equal the rollout's. None where there are none."""
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
