"""Does a relative reward's gradient do what SRPO's paper says? Four methods on the embedded model.

    python benchmarks/srpo.py run                          # every row that is missing; stop and go on as you like
    python benchmarks/srpo.py run --methods srpo refl --seeds 0
    python benchmarks/srpo.py table                        # what there is, as Markdown
    python benchmarks/srpo.py plot                         # results/srpo.png; needs the extra benchmarks

The wanted preference is a lighter background: what the embedded CLIP says of an image under "<prompt> on a light
background" less what it says under "... on a dark background". `srpo` follows that relative reward, `direct_align` and
`refl` the gradient of CLIP's absolute score of the prompt, and `flow_grpo` is paid the relative preference as a scalar.
All draw the same number of images with the same prompts; each row of benchmarks/results/srpo.jsonl is one training run.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import rows
import torch
from common import commit, free_port, machine

from align_cluster.algorithms import ALGORITHMS
from align_cluster.config.load import load
from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import TrainingChunk, make_micro_batches, rank_work, reduce_metrics
from align_cluster.learner.worker import Learner
from align_cluster.loop.advantages import AdvantageEstimator
from align_cluster.loop.requests import step_seed
from align_cluster.loop.rollouts import DrawnChunk
from align_cluster.observe.table import rows as score_rows
from align_cluster.observe.table import summarise
from align_cluster.prompts import PROMPTS
from align_cluster.prompts.groups import plan_evaluation, plan_step
from align_cluster.rewards.worker import RewardWorker
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.rollouts.steps import Euler

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "srpo.jsonl"
STEPS, GROUPS, GROUP, EVERY = 16, 4, 8, 8
GAIN = 0.05  # of preference, for which updates and seconds are counted
COLUMNS = {"preference": "reward/preference", "accuracy": "reward/geneval/accuracy", "clip": "reward/clip"}
ABSOLUTE = ["algorithm.relative=none", "algorithm.branches=denoise", "algorithm.margin=null"]
PAID = [
    *("algorithm={kind: grpo, clip: 2.0e-3, kl_beta: 0.01}", "rewards.clip.role=monitor"),
    *("rewards.preference.role=train", "advantage.std=global", "optimizer.lr=6e-4", "optimizer.max_grad_norm=1.0"),
    *("rollout.step={kind: flow_sde, noise_level: 0.7}", "rollout.window={kind: fraction, fraction: 0.4}"),
]
# name: overrides of embedded_srpo.yaml
METHODS = {
    "srpo": [],
    "srpo_half_lr": ["optimizer.lr=2.5e-4"],
    "direct_align": ABSOLUTE,
    "refl": ["algorithm={kind: refl, steps: [6, 8], margin: null, grad_scale: 1.0}"],
    "flow_grpo": PAID,
}


def overrides(method: str, seed: int) -> list[str]:
    """What makes embedded_srpo.yaml one row of the comparison."""
    shared = [f"steps={STEPS}", f"prompts_per_step={GROUPS}", f"rollout.group_size={GROUP}", f"seed={seed}"]
    evaluation = ["evaluate.count=30", f"evaluate.every={EVERY}", "evaluate.grid_every=0"]
    return [*shared, *evaluation, *METHODS[method]]


def train(config: RunConfig) -> Iterator[dict]:
    """The run's own samplers, rewards, credit and learner in this process, one of each and without Ray, whose start
    would take most of the time of so short a run. Yields a dict a step, with held-out scores where they are due."""
    learner = Learner(config.learner_setup, 0, 1, "127.0.0.1", free_port())
    sampler, scorer, estimator = (
        Sampler(config.backbone),
        RewardWorker(dict(config.rewards)),
        AdvantageEstimator(config),
    )
    sources = (config.prompts, config.evaluate.prompts)
    prompts, held_out = (PROMPTS[source.kind](source).load() for source in sources)
    rollout, held = config.rollout, config.evaluate
    fixed = plan_evaluation(held_out, held.count, held.images_per_prompt, held.images_per_prompt, config.seed)
    conditions: dict = {}

    def draw(chunks: list, request: DrawRequest) -> list[DrawnChunk]:
        new = [
            text for text in dict.fromkeys(text for chunk in chunks for text in chunk.texts) if text not in conditions
        ]
        conditions.update(zip(new, sampler.encode(new), strict=True))
        drawn = []
        for chunk in chunks:
            info, images, record = sampler.draw(chunk, conditions, None, request)
            drawn.append(DrawnChunk(info, images, record, scorer.score(images, chunk.prompts)))
        return drawn

    def adopt(source: str, version: int) -> None:
        sampler.adopt(*learner.publish(source, version))

    def evaluate(version: int) -> dict:
        adopt("evaluation", version)
        drawn = draw(fixed, DrawRequest(version, held.steps or rollout.steps, Euler.Config(), guidance=held.guidance))
        return summarise([row for item in drawn for row in score_rows(item.info.chunk.prompts, item.scores)])["overall"]

    yield {"held_out": evaluate(0)}
    algorithm, window = ALGORITHMS[config.algorithm.kind](config.algorithm), config.window
    for step in range(config.steps):
        started, version = time.perf_counter(), 2 * step + 1
        adopt("behaviour", version)
        chunks = plan_step(prompts, config.seed, step, config.prompts_per_step, rollout.group_size, rollout.group_size)
        planned = window.plan(rollout.steps, step, step_seed(config, step)) if window else None
        kept = planned or algorithm.states(rollout.steps)
        drawn = draw(
            chunks, DrawRequest(version, rollout.steps, config.step_kind, guidance=rollout.guidance, window=kept)
        )
        credit = estimator.assign(drawn)
        micro_batches = make_micro_batches(
            list(credit.advantages), list(credit.valid), bounds=config.update_bounds, size=rollout.group_size
        )
        pairs = [TrainingChunk(item.record, conditions) for item in drawn]
        trained = reduce_metrics([learner.update(rank_work(step, micro_batches, pairs))])
        row = {"seconds": time.perf_counter() - started, "train/grad_norm": trained["grad_norm"].mean}
        row |= {name: float(np.mean([item.scores.values[name] for item in drawn])) for name in ("preference", "clip")}
        yield row | ({"held_out": evaluate(version + 1)} if (step + 1) % held.every == 0 else {})


def one(method: str, seed: int) -> dict:
    """Train once, in this process; returns the row."""
    torch.set_num_threads(1)
    file = Path(__file__).parent.parent / "configs" / "embedded_srpo.yaml"
    settings, started = overrides(method, seed), time.perf_counter()
    steps = []
    for row in train(load(file, settings)):
        print(method, seed, len(steps), json.dumps(row), file=sys.stderr, flush=True)
        steps.append(row)
    held_out = [row["held_out"] for row in steps if "held_out" in row]
    return {
        "method": method,
        "seed": seed,
        "overrides": settings,
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "wall_seconds": round(time.perf_counter() - started),
        "cpu_seconds": round(time.process_time()),
        "steps_at": [place for place, row in enumerate(steps) if "held_out" in row],
        "held_out": {name: [scores[column] for scores in held_out] for name, column in COLUMNS.items()},
        "share": [scores["reward/preference/share"] for scores in held_out],
        "training": {name: [row[name] for row in steps[1:]] for name in ("preference", "clip")},
        "step_seconds": [row["seconds"] for row in steps[1:]],
    }


def run(method: str, seed: int) -> None:
    """Append one row, from a process of its own: DeepSpeed starts once in a process."""
    subprocess.run([sys.executable, __file__, "row", "--methods", method, "--seeds", str(seed)], check=True)


def reached(row: dict) -> tuple[int, float] | None:
    """(updates, seconds) after which training images, a mean over three steps, had gained GAIN of preference."""
    curve = np.array(row["training"]["preference"])
    smooth = np.convolve(curve, np.ones(3) / 3, mode="valid")
    found = np.flatnonzero(smooth >= curve[0] + GAIN)
    return (int(found[0]) + 2, sum(row["step_seconds"][: found[0] + 2])) if len(found) else None


def table(kept: list[dict]) -> str:
    """Means over seeds; +- is half the range over them."""
    lines = [
        "| method | seeds | preference before -> after | GenEval accuracy | CLIP of the prompt "
        f"| updates to +{GAIN:g} | seconds to it | s/step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        group = [row for row in kept if row["method"] == method]
        if not group:
            continue
        cells = []
        for name in COLUMNS:
            ends = np.array([row["held_out"][name] for row in group])[:, [0, -1]]
            cells.append(f"{ends[:, 0].mean():.3f} -> {ends[:, 1].mean():.3f} +- {np.ptp(ends[:, 1]) / 2:.3f}")
        times = [reached(row) for row in group]
        for place in (0, 1):
            there = [found[place] for found in times if found]
            missing = "" if len(there) == len(times) else f" ({len(times) - len(there)} of {len(times)} never)"
            cells.append((f"{np.mean(there):.0f}" if there else "-") + missing)
        seconds = np.mean([np.mean(row["step_seconds"]) for row in group])
        lines.append(f"| {method} | {len(group)} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines)


def plot(kept: list[dict]) -> None:
    """Held-out scores and the training images' preference against optimiser updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(19, 4.2), constrained_layout=True)
    for color, method in zip(plt.cm.tab10.colors, METHODS, strict=False):
        group = [row for row in kept if row["method"] == method]
        if not group:
            continue
        for axis, name in zip(axes, COLUMNS, strict=False):
            curves, at = np.array([row["held_out"][name] for row in group]), group[0]["steps_at"]
            axis.plot(at, curves.mean(0), "o-", color=color, label=f"{method} ({len(group)} seeds)")
            axis.fill_between(at, curves.min(0), curves.max(0), color=color, alpha=0.15, lw=0)
        curves = np.array([row["training"]["preference"] for row in group])
        axes[3].plot(np.arange(curves.shape[1]), curves.mean(0), color=color)
        axes[3].fill_between(np.arange(curves.shape[1]), curves.min(0), curves.max(0), color=color, alpha=0.15, lw=0)
    titles = ("held-out preference", "held-out GenEval accuracy", "held-out CLIP", "preference of training images")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="updates")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(RESULTS / "srpo.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table", "plot", "row"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    if args.command == "run":
        for seed in args.seeds:
            for method in args.methods:
                if any((row["method"], row["seed"]) == (method, seed) for row in rows.read(ROWS)):
                    continue
                run(method, seed)
    elif args.command == "row":
        rows.add(ROWS, one(args.methods[0], args.seeds[0]))
        return
    elif args.command == "plot":
        plot(rows.read(ROWS))
    print(table(rows.read(ROWS)))


if __name__ == "__main__":
    main()
