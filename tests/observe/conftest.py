"""A run directory as a real run leaves it, made with the real writers: curves that rise, figures that wobble."""

import math
from pathlib import Path

import numpy as np
import pytest

from align_cluster.embedded.render import render
from align_cluster.embedded.scene import prompts
from align_cluster.files import write_json, write_text
from align_cluster.observe.grids import save_grid
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import MetricWriter
from align_cluster.observe.table import by_prompt, summarise

TASKS = {"single_object": (0.58, 0.86), "colors": (0.5, 0.81), "two_object": (0.41, 0.47), "counting": (0.46, 0.6)}
CONFIG = """name: {name}
out: runs
seed: 7
steps: {steps}
prompts_per_step: 8
rollout: {{group_size: 12, steps: 10}}
backbone: {{kind: sd3, path: embedded}}
algorithm: {{kind: nft, beta: 1.0, kl: 0.15}}
rewards:
  geneval: {{kind: geneval, weight: 1.0, role: train}}  # <b>not markup</b>
  clip: {{kind: clip, weight: 0.0, role: monitor}}
"""


def held_out(progress: float, seed: int) -> dict:
    """A real summary of 60 prompts x 2 images whose scores are `progress` of the way."""
    rng = np.random.default_rng(seed)
    rows = []
    for task, (low, high) in TASKS.items():
        for prompt in range(15):
            level = low + progress * (high - low) + rng.normal(0, 0.12)
            for _ in range(2):
                graded = float(np.clip(level + rng.normal(0, 0.1), 0, 1))
                exact = float(graded > 0.7)
                row = {
                    "reward/geneval": (graded + exact) / 2,
                    "reward/geneval/accuracy": exact,
                    "reward/geneval/graded": graded,
                }
                row["reward/clip"] = 0.24 + 0.05 * graded if rng.random() > 0.02 else None
                rows.append({"task": task, "prompt_id": prompt, **row})
    return summarise(rows, resamples=300) | {"headline": "reward/geneval/graded", "by_prompt": by_prompt(rows)}


def step_values(step: int, steps: int, rng: np.random.Generator) -> dict[str, float]:
    """What a step writes."""
    progress = 1 - math.exp(-3 * step / steps)
    values = {"reward/geneval/mean": 0.49 + 0.2 * progress + rng.normal(0, 0.025)}
    for task, (low, high) in TASKS.items():
        values[f"reward/geneval/{task}"] = low + progress * (high - low) + rng.normal(0, 0.05)
    values["reward/geneval/images_per_s"] = 40 + rng.normal(0, 1)
    values["reward/clip/mean"] = 0.265 + 0.012 * progress + rng.normal(0, 0.002)
    values |= {"group/reward_std_mean": 0.17 - 0.05 * progress + rng.normal(0, 0.008)}
    values |= {"group/zero_std_ratio": max(0.0, rng.normal(0.04 + 0.1 * progress, 0.05))}
    values |= {"train/loss": 0.9 - 0.2 * progress + rng.normal(0, 0.04), "train/grad_norm": abs(rng.normal(0.4, 0.1))}
    values |= {
        "train/kl": 0.004 * progress + abs(rng.normal(0, 2e-4)),
        "train/log_ratio_max": abs(rng.normal(0, 0.02)),
    }
    values["lr"] = 7e-4 * min(1.0, 1.27 - 1.22 * step / steps)
    for stage, seconds in {"rollout": 3.1, "reward": 0.7, "credit": 0.01, "update": 2.4, "publish": 0.06}.items():
        values[f"time/{stage}"] = seconds * (1 + abs(rng.normal(0, 0.08)))
    values["time/step"] = sum(value for name, value in values.items() if name.startswith("time/"))
    values |= {"time/learner": 2.2, "throughput/images_per_s": 96 / values["time/step"]}
    return values | {"weights/bytes": 1_540_096.0, "weights/adopt_s": 0.012 + abs(rng.normal(0, 0.002))}


@pytest.fixture
def make_run(tmp_path: Path):
    """Function (name, steps, done=None, finished=True) -> RunDir of a run that did `done` of `steps` steps."""

    def make(name: str = "quickstart", steps: int = 40, done: int | None = None, finished: bool = True) -> RunDir:
        return build_run(tmp_path / "runs", name, steps, steps if done is None else done, finished)

    return make


def build_run(out: Path, name: str, steps: int, done: int, finished: bool) -> RunDir:
    run = RunDir.create(out, name)
    rng = np.random.default_rng(3)
    write_text(run.config, CONFIG.format(name=name, steps=steps))
    records = [prompts(task, "held_out")[index] for index in (0, 1) for task in TASKS]
    texts = [record["prompt"] for record in records[:-1]] + ["<script>alert('x')</script> & \"quotes\""]
    write_json(run.grid_prompts, texts)
    with MetricWriter(run.path) as writer:
        first = last = held_out(0.0, 1)
        writer.evaluation(0, 0, "base", first)
        grid(run, 0, records, texts, wrong=0.75)
        for step in range(1, done + 1):
            values = step_values(step, steps, rng)
            if step == 9:
                values["train/kl"] = math.nan
            writer.write(step, values)
            if step % 10 == 0:
                last = held_out(1 - math.exp(-3 * step / steps), 1)
                writer.evaluation(step, step, "ema", last)
                grid(run, step, records, texts, wrong=0.75 - 0.6 * step / steps)
    if finished:
        stage_seconds = {
            "rollout": 128.4,
            "reward": 29.1,
            "credit": 0.4,
            "update": 99.2,
            "publish": 2.5,
            "evaluate": 41.0,
        }
        write_json(
            run.summary,
            {
                "name": name,
                "seed": 7,
                "headline": "reward/geneval/graded",
                "before": {key: value for key, value in first.items() if key != "by_prompt"},
                "after": {key: value for key, value in last.items() if key != "by_prompt"},
                "images_drawn": 4800,
            }
            | {"images_per_s": 15.8, "wall_seconds": 303.7, "stage_seconds": stage_seconds, "steps": done}
            | {
                "lora_checksum": "xxh3:9f2c41d07be5a813",
                "lora_path": "runs/quickstart/lora",
                "workers_lost": 0,
                "config_hash": "5be1c07a",
            }
            | {"versions": {"align-cluster": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "diffusers": "0.42.1"}}
            | {"self_check": {"max_abs_log_ratio": 2.4e-7}},
        )
    return run


def grid(run: RunDir, step: int, records: list[dict], texts: list[str], wrong: float) -> None:
    """Rendered samples, `wrong` of them of another prompt, four a prompt."""
    rng = np.random.default_rng(step)
    others = [prompts(task, "train")[int(rng.integers(60))] for task in TASKS for _ in range(8)]
    chosen = [others[index] if rng.random() < wrong else records[index // 4] for index in range(4 * len(records))]
    images = render(chosen, seed=5).permute(0, 2, 3, 1).numpy()
    save_grid(images, 4, run.grid(step), texts)
