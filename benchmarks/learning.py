"""Do E2PO and SLAS do what their papers say? Five methods at an equal number of drawn images, on the embedded model.

    python benchmarks/learning.py run                          # every row that is missing; stop and go on as you like
    python benchmarks/learning.py run --domains geneval --methods nft e2po_nft --seeds 0
    python benchmarks/learning.py table                        # what there is, as Markdown
    python benchmarks/learning.py plot                         # results/learning_*.png; needs the extra benchmarks

A domain names the reward that is trained: the strict 0/1 GenEval rule, or the embedded CLIP's preference. The other one
is only measured: how a method does out of its domain. Every method draws the same number of images in groups of 8; each
row of benchmarks/results/learning.jsonl is one training run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import rows
from common import commit, machine

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "learning.jsonl"
STEPS, PROMPTS, GROUP, EVERY = 48, 12, 8, 12
# name: (run file, overrides)
METHODS = {
    "nft": ("quickstart", [f"rollout.group_size={GROUP}"]),
    "e2po_nft": ("embedded_e2po_efficient", []),  # 2 noises x 4 conditions
    "flow_grpo": ("embedded_grpo", [f"rollout.group_size={GROUP}", "optimizer.lr=6e-4"]),
    "dance": ("embedded_dance", [f"rollout.group_size={GROUP}"]),
    "slas_dance": ("embedded_slas", [f"rollout.group_size={GROUP}"]),
}
DOMAINS = ("geneval", "clip")
COLUMNS = {"accuracy": "reward/geneval/accuracy", "graded": "reward/geneval/graded", "clip": "reward/clip"}
STEP_METRICS = ("group/zero_std_ratio", "group/reward_std_mean", "time/step", "time/explore")


def overrides(domain: str, method: str, seed: int) -> list[str]:
    """What makes a method's run file one row of the comparison."""
    roles = [f"rewards.{name}.role={'train' if name == domain else 'monitor'}" for name in DOMAINS]
    shared = [f"steps={STEPS}", f"prompts_per_step={PROMPTS}", f"seed={seed}", "rewards.geneval.score=strict"]
    evaluation = [f"evaluate.every={EVERY}", "evaluate.grid_every=0"]
    return [*shared, *roles, *evaluation, *METHODS[method][1]]


def run(domain: str, method: str, seed: int) -> dict:
    """Train once, in a process of its own; returns the row."""
    settings = overrides(domain, method, seed)
    with tempfile.TemporaryDirectory() as folder:
        found = train(METHODS[method][0], settings, Path(folder))
    return {"domain": domain, "method": method, "seed": seed, **found}


def train(config: str, settings: list[str], folder: Path) -> dict:
    """Train a run file into `folder`/row, in a process of its own; what every row says of its run."""
    file = Path(__file__).parent.parent / "configs" / f"{config}.yaml"
    command = [sys.executable, "-m", "align_cluster.cli", "train", str(file), "--out", str(folder), "--name", "row"]
    subprocess.run([*command, *(part for setting in settings for part in ("--set", setting))], check=True)
    out = folder / "row"
    summary = json.loads((out / "summary.json").read_text())
    steps, evaluations = (rows.read(out / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    return {
        "config": file.name,
        "overrides": settings,
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "wall_seconds": round(summary["wall_seconds"]),
        "images": [row["step"] * PROMPTS * GROUP for row in evaluations],
        "held_out": {name: [row["overall"][column] for row in evaluations] for name, column in COLUMNS.items()},
        "steps": {name: [row.get(name) for row in steps] for name in STEP_METRICS},
    }


def table(kept: list[dict]) -> str:
    """Mean over seeds of what the runs ended with; +- is half the range over seeds, late the last quarter of steps."""
    lines = [
        "| trained on | method | seeds | accuracy before -> after | clip before -> after | zero-std groups, late "
        "| reward std, late | s/step | of it phase 1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for domain, method, group in grouped(kept):
        ends = {name: np.array([row["held_out"][name] for row in group])[:, [0, -1]] for name in ("accuracy", "clip")}
        late = {
            name: np.array([row["steps"][name][-STEPS // 4 :] for row in group], dtype=float).mean()
            for name in STEP_METRICS[:2]
        }
        seconds = [np.mean([[t or 0.0 for t in row["steps"][name]] for row in group]) for name in STEP_METRICS[2:]]
        cells = [
            f"{values[:, 0].mean():.3f} -> {values[:, 1].mean():.3f} +- {np.ptp(values[:, 1]) / 2:.3f}"
            for values in ends.values()
        ]
        lines.append(
            f"| {domain} | {method} | {len(group)} | {' | '.join(cells)} | {late[STEP_METRICS[0]]:.3f} "
            f"| {late[STEP_METRICS[1]]:.3f} | {seconds[0]:.1f} | {100 * seconds[1] / seconds[0]:.0f} % |"
        )
    return "\n".join(lines)


def grouped(kept: list[dict]) -> Iterator[tuple[str, str, list[dict]]]:
    for domain in DOMAINS:
        for method in METHODS:
            group = [row for row in kept if (row["domain"], row["method"]) == (domain, method)]
            if group:
                yield domain, method, group


def plot(kept: list[dict]) -> None:
    """One picture a domain: held-out scores, zero-std ratio and reward spread against images drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for domain in DOMAINS:
        figure, axes = plt.subplots(1, 4, figsize=(19, 4.2), constrained_layout=True)
        for color, (_, method, group) in zip(
            plt.cm.tab10.colors, (entry for entry in grouped(kept) if entry[0] == domain), strict=False
        ):
            for axis, name in zip(axes, ("accuracy", "clip"), strict=False):
                curves = np.array([row["held_out"][name] for row in group])
                axis.plot(group[0]["images"], curves.mean(0), color=color, label=f"{method} ({len(group)} seeds)")
                axis.fill_between(group[0]["images"], curves.min(0), curves.max(0), color=color, alpha=0.15, lw=0)
            for axis, name in zip(axes[2:], STEP_METRICS[:2], strict=True):
                curve = np.array([row["steps"][name] for row in group], dtype=float).mean(0)
                width = min(8, len(curve))
                smooth = np.convolve(curve, np.ones(width) / width, mode="valid")
                axis.plot((np.arange(len(smooth)) + width) * PROMPTS * GROUP, smooth, color=color)
        titles = (
            "held-out GenEval accuracy",
            "held-out CLIP",
            "zero-std groups (mean of 8 steps)",
            "reward std in a group",
        )
        for axis, title in zip(axes, titles, strict=True):
            axis.set(title=title, xlabel="images drawn")
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8)
        figure.suptitle(f"trained on {domain}: lines are means over seeds, bands their range")
        figure.savefig(RESULTS / f"learning_{domain}.png", dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table", "plot"])
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    if args.command == "run":
        for seed in args.seeds:
            for domain in args.domains:
                for method in args.methods:
                    if any(
                        (row["domain"], row["method"], row["seed"]) == (domain, method, seed) for row in rows.read(ROWS)
                    ):
                        continue
                    rows.add(ROWS, run(domain, method, seed))
    elif args.command == "plot":
        plot(rows.read(ROWS))
    print(table(rows.read(ROWS)))


if __name__ == "__main__":
    main()
