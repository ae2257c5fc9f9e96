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
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
from alignment import commit

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "srpo.jsonl"
STEPS, PROMPTS, GROUP, EVERY = 16, 4, 8, 8
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
    "direct_align": ABSOLUTE,
    "refl": ["algorithm={kind: refl, steps: [6, 8], margin: null, grad_scale: 1.0}"],
    "flow_grpo": PAID,
}


def overrides(method: str, seed: int) -> list[str]:
    """What makes embedded_srpo.yaml one row of the comparison."""
    shared = [f"steps={STEPS}", f"prompts_per_step={PROMPTS}", f"rollout.group_size={GROUP}", f"seed={seed}"]
    evaluation = ["evaluate.count=30", f"evaluate.every={EVERY}", "evaluate.grid_every=0"]
    return [*shared, *evaluation, *METHODS[method]]


def run(method: str, seed: int) -> dict:
    """Train once, in a process of its own; returns the row."""
    config = Path(__file__).parent.parent / "configs" / "embedded_srpo.yaml"
    settings = overrides(method, seed)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "align_cluster.cli", "train", str(config), "--out", folder, "--name", "row"]
        subprocess.run([*command, *(part for setting in settings for part in ("--set", setting))], check=True)
        out = Path(folder) / "row"
        summary = json.loads((out / "summary.json").read_text())
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        evaluations = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    return {
        "method": method,
        "seed": seed,
        "overrides": settings,
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "wall_seconds": round(summary["wall_seconds"]),
        "steps_at": [row["step"] for row in evaluations],
        "held_out": {name: [row["overall"][column] for row in evaluations] for name, column in COLUMNS.items()},
        "share": [row["overall"]["reward/preference/share"] for row in evaluations],
        "training": {name: [row[f"{COLUMNS[name]}/mean"] for row in steps] for name in ("preference", "clip")},
        "step_seconds": [row["time/step"] for row in steps],
    }


def rows() -> list[dict]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


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
    parser.add_argument("command", choices=["run", "table", "plot"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    if args.command == "run":
        RESULTS.mkdir(exist_ok=True)
        for seed in args.seeds:
            for method in args.methods:
                if any((row["method"], row["seed"]) == (method, seed) for row in rows()):
                    continue
                row = run(method, seed)
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    elif args.command == "plot":
        plot(rows())
    print(table(rows()))


if __name__ == "__main__":
    main()
