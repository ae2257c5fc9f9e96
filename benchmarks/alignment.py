"""Does a run file align the model? Trains it with several seeds and reports held-out scores before and after.

    python benchmarks/alignment.py configs/quickstart.yaml --seeds 0 1 2
    python benchmarks/alignment.py configs/quickstart.yaml --seeds 0 --set steps=240 --label "quickstart, 4x"

Results are added to benchmarks/results/alignment.json under the label; the table goes to stdout as Markdown.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from common import commit, machine

RESULTS = Path(__file__).parent / "results" / "alignment.json"


def run(config: Path, seed: int, overrides: list[str], out: Path) -> dict:
    """Summary of one training run in its own process."""
    name = f"seed{seed}"
    command = [sys.executable, "-m", "align_cluster.cli", "train", str(config), "--out", str(out), "--name", name]
    for override in [f"seed={seed}", *overrides]:
        command += ["--set", override]
    subprocess.run(command, check=True)
    return json.loads((out / name / "summary.json").read_text())


def entry(config: Path, overrides: list[str], summaries: list[dict]) -> dict:
    """What is kept of the runs: per seed and task the headline score before and after, and the mean change."""
    column = summaries[0]["headline"]
    accuracy = column.replace("/graded", "/accuracy")

    def change(summary: dict, name: str) -> float:
        return summary["after"]["overall"][name] - summary["before"]["overall"][name]

    return {
        "config": config.name,
        "overrides": overrides,
        "column": column,
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "seeds": {
            str(summary["seed"]): {
                "before": {task: scores[column] for task, scores in summary["before"]["tasks"].items()},
                "after": {task: scores[column] for task, scores in summary["after"]["tasks"].items()},
                "overall": [summary[when]["overall"][column] for when in ("before", "after")],
                "interval_after": summary["after"]["interval"][column],
                "accuracy": [summary[when]["overall"][accuracy] for when in ("before", "after")],
                "held_out_prompts": summary["after"]["prompts"],
                "wall_seconds": round(summary["wall_seconds"]),
                "images": summary["images_drawn"],
                "lora_checksum": summary["lora_checksum"],
            }
            for summary in summaries
        },
        "mean_change": sum(change(summary, column) for summary in summaries) / len(summaries),
        "mean_accuracy_change": sum(change(summary, accuracy) for summary in summaries) / len(summaries),
    }


def markdown(results: dict) -> str:
    """All kept entries as one table."""
    lines = [
        "| run | seed | held-out graded, before -> after | change | accuracy | images | wall |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, kept in results.items():
        for seed, row in kept["seeds"].items():
            before, after = row["overall"]
            accuracy = " -> ".join(f"{value:.3f}" for value in row["accuracy"])
            lines.append(
                f"| {label} | {seed} | {before:.3f} -> {after:.3f} | {after - before:+.3f} | {accuracy} "
                f"| {row['images']} | {row['wall_seconds'] // 60} min {row['wall_seconds'] % 60:02d} s |"
            )
        if len(kept["seeds"]) > 1:
            lines.append(
                f"| {label} | mean | | **{kept['mean_change']:+.3f}** | {kept['mean_accuracy_change']:+.3f} | | |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as for train")
    parser.add_argument("--label", help="name of the entry (default: the config's)")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        summaries = [run(args.config, seed, args.set, Path(folder)) for seed in args.seeds]
    results[args.label or args.config.stem] = entry(args.config, args.set, summaries)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
