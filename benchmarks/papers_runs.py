"""The training runs that claims of the papers are decided by: one arm with one seed is one line of results/papers.jsonl.

A run is `align-cluster train` with a run file and overrides, in a process of its own. Its row keeps the held-out scores
of each prompt at each evaluation, so that arms are compared prompt by prompt.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from common import commit, machine
from rows import read

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks" / "results" / "papers.jsonl"
COLUMNS = ("geneval/accuracy", "clip", "preference", "jpeg")
STEP_METRICS = ("group/zero_std_ratio", "group/reward_std_mean", "advantage/abs_mean", "time/step")
QUIET = ("evaluate.grid_every=0", "checkpoint.every=0")


@dataclass(frozen=True)
class Arm:
    """Names a run file of configs/ and what one side of a comparison overrides in it.

    `prompted` trains nothing: the base model draws each held-out prompt as it is, and then with this phrase behind it.
    """

    config: str
    settings: tuple[str, ...] = ()
    prompted: str | None = None


def strict(*settings: str) -> tuple[str, ...]:
    """Return what all runs on the strict GenEval rule share: 48 steps of 12 prompts, 60 held-out prompts x 4 images."""
    shared = ("steps=48", "prompts_per_step=12", "evaluate.every=24", "rewards.geneval.score=strict")
    return (*shared, *QUIET, *settings)


def hackable(*settings: str) -> tuple[str, ...]:
    """Return what all runs on a reward that can be hacked share: small files add a little to being right."""
    tasks = [f"{block}.tasks=[single_object,colors]" for block in ("prompts", "evaluate.prompts")]
    reward = ("rewards.geneval.score=strict", "rewards.jpeg={kind: jpeg, weight: 0.05}")
    return (*tasks, *reward, "advantage.clip=5", "algorithm.advantage_clip=5", *QUIET, *settings)


ARMS = {
    "nft_2": Arm("quickstart", strict("rollout.group_size=2")),
    "nft_8": Arm("quickstart", strict("rollout.group_size=8")),
    "e2po_2x4": Arm("embedded_e2po_efficient", strict()),
    "hack_prompt": Arm("quickstart", hackable("advantage.std=group")),
    "hack_global": Arm("quickstart", hackable("advantage.std=global")),
    "hack_slas": Arm("quickstart", hackable("advantage.std=batch", "advantage.shaping={kind: slas, gamma: 0.5}")),
}


def train(name: str, seed: int) -> dict:
    """Train an arm once; return its row."""
    arm, started, used = ARMS[name], time.perf_counter(), _processor()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row"
        settings = [f"seed={seed}", *arm.settings]
        command = [sys.executable, "-m", "align_cluster.cli", "train", str(ROOT / "configs" / f"{arm.config}.yaml")]
        command += ["--out", folder, "--name", "row", "--set", *settings]
        subprocess.run(command, check=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})
        steps, evaluations = (read(out / f"{file}.jsonl") for file in ("metrics", "evaluations"))
        summary = json.loads((out / "summary.json").read_text())
    return {
        "arm": name,
        "seed": seed,
        "config": arm.config,
        "overrides": settings,
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "wall_seconds": round(time.perf_counter() - started),
        "processor_seconds": round(_processor() - used),
        "images": summary["images_drawn"],
        "at": [row["step"] for row in evaluations],
        "held_out": per_prompt(evaluations),
        "steps": {key: [row.get(key) for row in steps] for key in STEP_METRICS},
    }


def per_prompt(evaluations: list[dict]) -> dict[str, list[list[float]]]:
    """Return {column: [each evaluation: [each prompt: mean score]]}, prompts in the same order everywhere."""
    found: dict[str, list[list[float]]] = {}
    for evaluation in evaluations:
        for column in COLUMNS:
            tasks = [scores.get(f"reward/{column}") for _, scores in sorted(evaluation["by_prompt"].items())]
            if all(tasks):
                values = [float(f"{task[prompt]:.4g}") for task in tasks for prompt in sorted(task, key=int)]
                found.setdefault(column, []).append(values)
    return found


def _processor() -> float:
    """Return the seconds of processor time of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
