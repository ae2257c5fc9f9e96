"""How long a whole run of two steps takes, beside one process that imports what it needs:  python benchmarks/startup.py

The process imports torch, diffusers, peft and DeepSpeed, and loads the embedded denoiser with an adapter. The run is
`align-cluster train` of the quickstart with two steps and evaluations of two images: Ray starts, workers start, draw,
score, learn, are evaluated, and end. Both are timed in turns, from outside, and the medians are compared. Other folders
with this package, such as a worktree of an older commit, are timed in the same turns:

    python benchmarks/startup.py --rounds 5 . ../before
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALONE = """
import align_cluster, torch, diffusers, peft, deepspeed
from align_cluster.backbones.adapters import add_adapters
from align_cluster.backbones.sd3 import SD3
backbone = SD3(SD3.Config(path="embedded"))
add_adapters(backbone, backbone.load_denoiser(), ("default",))
"""
SHORT = "steps=2 evaluate.count=2 evaluate.images_per_prompt=1 evaluate.every=0 evaluate.grid_every=0".split()


def seconds(package: Path, command: list[str]) -> float:
    """Wall time of a command with the package in a folder; its workers have the priority that other processes have."""
    env = os.environ | {"PYTHONPATH": str(package), "RAY_worker_niceness": "0"}
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=package, env=env, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", type=Path, default=[Path(__file__).parents[1]])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    packages = [package.resolve() for package in args.packages]
    alone: list[float] = []
    runs: dict[Path, list[float]] = {package: [] for package in packages}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            alone.append(seconds(packages[0], ["-c", ALONE]))
            for number, package in enumerate(packages):
                command = ["-m", "align_cluster.cli", "train", "configs/quickstart.yaml", "--out", folder]
                runs[package].append(seconds(package, [*command, "--name", f"{number}-{turn}", "--set", *SHORT]))
            print(f"turn {turn + 1}: {alone[-1]:.1f} s alone, runs {[round(run[-1], 1) for run in runs.values()]} s")
    one = statistics.median(alone)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; imports and model in one process: {one:.1f} s")
    for package, times in runs.items():
        print(f"{package.name}: {statistics.median(times):.1f} s, {statistics.median(times) / one:.2f} times that")


if __name__ == "__main__":
    main()
