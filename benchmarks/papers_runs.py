"""The runs that decide claims of the papers: one arm with one seed is one line of results/papers.jsonl.

A run is `align-cluster train` with a run file and overrides, in a process of its own. Its row keeps the held-out scores
of each prompt at each evaluation, so that arms are compared prompt by prompt.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from common import commit, machine
from rows import read

from align_cluster.config.load import load
from align_cluster.embedded import scene

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks" / "results" / "papers.jsonl"
COLUMNS = ("geneval/accuracy", "clip", "preference", "jpeg")
STEP_METRICS = ("group/zero_std_ratio", "group/reward_std_mean", "advantage/abs_mean", "time/step")
SECONDS = {"nft": 0.03, "grpo": 0.04, "ppo": 0.17, "srpo": 0.1, "refl": 0.1}  # an image, on two quiet cores
QUIET = ("evaluate.grid_every=0", "checkpoint.every=0")


@dataclass(frozen=True)
class Arm:
    """Names a run file of configs/ and what one side of a comparison overrides in it.

    `prompted` trains nothing: the base model draws each held-out prompt as it is, and then with this phrase behind it.
    `diversity` measures how far apart the embedded CLIP sees the images of a prompt, before and after.
    """

    config: str
    settings: tuple[str, ...]
    prompted: str | None = None
    diversity: bool = False


def strict(*settings: str) -> tuple[str, ...]:
    """Return what all runs on the strict GenEval rule share: 48 steps of 12 prompts, 60 held-out prompts x 4 images."""
    shared = ("steps=48", "prompts_per_step=12", "evaluate.every=24", "rewards.geneval.score=strict")
    return (*shared, *QUIET, *settings)


def hackable(*settings: str) -> tuple[str, ...]:
    """Return what all runs on a reward that can be hacked share: small files add a little to being right."""
    tasks = [f"{block}.tasks=[single_object,colors]" for block in ("prompts", "evaluate.prompts")]
    reward = ("rewards.geneval.score=strict", "rewards.jpeg={kind: jpeg, weight: 0.05}")
    return (*tasks, *reward, "advantage.clip=5", "algorithm.advantage_clip=5", *QUIET, *settings)


def preferred(*settings: str) -> tuple[str, ...]:
    """Return what all runs on the preference for light backgrounds share: 20 updates of 32 images.

    Their prompts name no background, and belong to tasks whose captions do: there the phrase costs no accuracy.
    """
    sources = ("prompts={kind: jsonl, path: train.jsonl}", "evaluate.prompts={kind: jsonl, path: held_out.jsonl}")
    return (*sources, "steps=20", "evaluate.every=4", "rewards.geneval.score=strict", *QUIET, *settings)


def long(*settings: str) -> tuple[str, ...]:
    """Return what policy gradients share that are paid CLIP's preference for 16,128 images."""
    rewards = ("rewards.clip.role=train", "rewards.geneval.role=monitor")
    return ("steps=168", "evaluate.every=56", *rewards, *QUIET, *settings)


COLLAPSE = ("steps=320", "evaluate.every=80", "prompts.tasks=[single_object,colors]")
COLLAPSE += ("evaluate.prompts.tasks=[single_object,colors]",)
ABSOLUTE = ("algorithm.relative=none", "algorithm.branches=denoise", "algorithm.margin=null")
PAID = (
    *("algorithm={kind: grpo, clip: 2.0e-3, kl_beta: 0.01}", "rewards.clip.role=monitor"),
    *("rewards.preference.role=train", "advantage.std=global", "optimizer.lr=6e-4", "optimizer.max_grad_norm=1.0"),
    *("rollout.step={kind: flow_sde, noise_level: 0.7}", "rollout.window={kind: fraction, fraction: 0.4}"),
)
ARMS = {
    "nft_2": Arm("quickstart", strict("rollout.group_size=2")),
    "nft_8": Arm("quickstart", strict("rollout.group_size=8")),
    "e2po_2x4": Arm("embedded_e2po_efficient", strict()),
    "e2po_static": Arm("embedded_e2po_efficient", strict("exploration.schedule=static")),
    "e2po_unanchored": Arm("embedded_e2po_efficient", strict("exploration.anchor=false")),
    "e2po_perturbed": Arm("embedded_e2po_efficient", strict("exploration.update=perturbed")),
    "e2po_both": Arm("embedded_e2po_efficient", strict("exploration.encoders=both")),
    "e2po_1x8": Arm("embedded_e2po_efficient", strict("rollout.group_size=1", "exploration.conditions=8")),
    "collapse_nft": Arm("quickstart", strict("rollout.group_size=8", *COLLAPSE), diversity=True),
    "collapse_e2po": Arm("embedded_e2po_efficient", strict(*COLLAPSE), diversity=True),
    "hack_prompt": Arm("quickstart", hackable("advantage.std=group")),
    "hack_global": Arm("quickstart", hackable("advantage.std=global")),
    "hack_slas": Arm("quickstart", hackable("advantage.std=batch", "advantage.shaping={kind: slas, gamma: 0.5}")),
    "dance": Arm("embedded_dance", long()),
    "slas": Arm("embedded_slas", long()),
    "flow_grpo": Arm("embedded_grpo", strict("rollout.group_size=8", "optimizer.lr=6e-4")),
    **{
        f"critic_{decay}": Arm(
            "embedded_critic", strict("prompts_per_step=96", "optimizer.lr=6e-4", f"algorithm.decay={decay}")
        )
        for decay in ("0.95", "0.5", "0")
    },
    "srpo": Arm("embedded_srpo", preferred()),
    "srpo_all": Arm("embedded_srpo", preferred("algorithm.levels=[0.964, 0.05]")),
    "srpo_late": Arm("embedded_srpo", preferred("algorithm.levels=[0.5, 0.05]")),
    "direct_align": Arm("embedded_srpo", preferred(*ABSOLUTE)),
    "refl": Arm("embedded_srpo", preferred("algorithm={kind: refl, steps: [6, 8], margin: null, grad_scale: 1.0}")),
    "paid": Arm("embedded_srpo", preferred(*PAID)),
    "prompted": Arm("embedded_srpo", preferred(), prompted="on a light background"),
}


def run(name: str, seed: int) -> dict:
    """Run an arm once; return its row."""
    arm, started = ARMS[name], time.perf_counter()
    settings = [f"seed={seed}", *arm.settings]
    facts = {"arm": name, "seed": seed, "config": arm.config, "overrides": settings}
    facts |= {"date": date.today().isoformat(), "commit": commit(), "machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(Path(folder))
        found = prompt(arm, settings, Path(folder)) if arm.prompted else train(arm, settings, Path(folder))
    return facts | {"wall_seconds": round(time.perf_counter() - started)} | found


def expected(name: str) -> tuple[int, float]:
    """Return the images that an arm trains on, and the minutes that a run of it takes on two quiet cores."""
    arm = ARMS[name]
    if arm.prompted:
        return 0, 1.0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_prompts(Path(folder))
        config = load(ROOT / "configs" / f"{arm.config}.yaml", list(arm.settings))
    images = config.steps * config.images_per_step
    return images, 1 + images * SECONDS[config.algorithm.kind] / 60


def write_prompts(folder: Path) -> None:
    """Write train.jsonl and held_out.jsonl: embedded prompts of colours and of two objects that name no background."""
    for split in ("train", "held_out"):
        records = [record for task in ("colors", "two_object") for record in scene.prompts(task, split)]
        lines = [json.dumps(record) for record in records if "background" not in record["prompt"]]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


def prompt(arm: Arm, settings: list[str], folder: Path) -> dict:
    """Let the base model draw, in this process; return what the row says of it."""
    from papers_draw import prompted

    with contextlib.chdir(folder):
        plain, worded = prompted(ROOT / "configs" / f"{arm.config}.yaml", settings, arm.prompted)
    return {"images": 0, "at": [0, 0], "held_out": per_prompt([plain, worded]), "steps": {}}


def train(arm: Arm, settings: list[str], folder: Path) -> dict:
    """Train in a process of its own; return what the row says of it."""
    command = [sys.executable, "-m", "align_cluster.cli", "train", str(ROOT / "configs" / f"{arm.config}.yaml")]
    command += ["--out", str(folder), "--name", "row", "--set", *settings]
    subprocess.run(command, check=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})
    steps, evaluations = (read(folder / "row" / f"{file}.jsonl") for file in ("metrics", "evaluations"))
    found = per_prompt([evaluation["by_prompt"] for evaluation in evaluations])
    if arm.diversity:
        from papers_draw import diversity

        found["diversity"] = diversity(folder / "row")
    return {
        "images": json.loads((folder / "row" / "summary.json").read_text())["images_drawn"],
        "at": [evaluation["step"] for evaluation in evaluations],
        "held_out": found,
        "steps": {key: [row.get(key) for row in steps] for key in STEP_METRICS},
    }


def per_prompt(evaluations: list[dict]) -> dict[str, list[list[float]]]:
    """Return {column: [each evaluation: [each prompt: mean score]]}, prompts in the same order everywhere.

    An evaluation is {task: {column: {prompt: mean}}}, as evaluations.jsonl has it.
    """
    found: dict[str, list[list[float]]] = {}
    for tasks in evaluations:
        for column in COLUMNS:
            parts = [scores[f"reward/{column}"] for _, scores in sorted(tasks.items()) if f"reward/{column}" in scores]
            if parts:
                values = [float(f"{part[prompt]:.4g}") for part in parts for prompt in sorted(part, key=int)]
                found.setdefault(column, []).append(values)
    return found
