"""How fast are the steps of a run, in this tree and in others, such as a worktree of an older commit?

    python benchmarks/compare.py configs/quickstart.yaml ../before
    python benchmarks/compare.py configs/embedded_grpo.yaml ../before --steps 8 --rounds 3 --set prompts_per_step=4

Each tree runs the same file a few steps long, in turns, on an otherwise idle machine. A step's time is wall time from
one row of metrics.jsonl to the next, so it holds everything that the driver does. The table has medians over all steps
but the first two, and each tree's speed over that of the last one named.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[1]
QUIET = (
    "evaluate.count=2 evaluate.images_per_prompt=1 evaluate.every=0 evaluate.grid_every=0 checkpoint.every=0".split()
)
COMMAND = "import sys; from align_cluster.cli import main; sys.exit(main(sys.argv[1:]))"


def steps(tree: Path, file: str, overrides: list[str]) -> list[float]:
    """Seconds of each step but the first two, of a run in `tree`; its workers have ordinary priority."""
    env = os.environ | {"PYTHONPATH": str(tree), "RAY_worker_niceness": "0"}
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", COMMAND, "train", str(tree / file), "--out", out, "--set", *QUIET, *overrides]
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{tree}: {done.stderr.strip()[-1000:]}")
        (rows,) = Path(out).glob("*/metrics.jsonl")
        ends = [json.loads(line)["seconds"] for line in rows.read_text().splitlines()]
    return [end - begin for begin, end in zip(ends[1:], ends[2:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="run file, as every tree has it, such as configs/quickstart.yaml")
    parser.add_argument("trees", nargs="+", type=Path, help="other trees")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", nargs="+", default=[], metavar="PATH=VALUE", help="overrides for every tree")
    args = parser.parse_args()
    trees = [HERE, *(tree.resolve() for tree in args.trees)]
    found: dict[Path, list[float]] = {tree: [] for tree in trees}
    for index in range(args.rounds):
        for tree in trees[:: -1 if index % 2 else 1]:
            found[tree] += steps(tree, args.file, [f"steps={args.steps}", *args.set])
    last = statistics.median(found[trees[-1]])
    print("| tree | s a step | fastest | speed |\n|---|---|---|---|")
    for tree, seconds in found.items():
        middle = statistics.median(seconds)
        print(f"| {tree.name} | {middle:.2f} | {min(seconds):.2f} | {last / middle:.2f} |")


if __name__ == "__main__":
    main()
