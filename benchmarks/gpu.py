"""How fast is one GPU used, and does a run take what the planner says? One script, under eight minutes on 80 GB.

    python benchmarks/gpu.py --stages plan                   # before, on any machine: what the planner says, minutes
    python benchmarks/gpu.py                                 # on the card: all stages that are not done yet
    python benchmarks/gpu.py --stages rollout,learner --again
    python benchmarks/gpu.py --tiny --device cpu             # a rehearsal of the same code; its figures mean nothing

plan        bytes and FLOPs of all that is measured, by `align-cluster plan`'s own code
rollout     SD3.5-M's shape, 512 px, 10 steps: images/s by rows; eager, compiled, CUDA graphs, LoRA merged or not
learner     SD3.5-M's shape: a weight sync, a whole DiffusionNFT step, NFT's and GRPO's updates by engine
tests       pytest -m gpu
quickstart  the whole system on Ray, a reward worker on a fifth of the card
flux        FLUX.1-dev's shape: does SRPO at 720 px fit as planned; rollouts and an update at 512 px
rewards     HPS, PickScore, CLIP-L and Mask2Former: images/s by batch

Networks have the published shapes and random weights, which are made on the card: nothing is downloaded. Each stage
runs in a process of its own, so a hang, a crash or a lack of memory costs that stage only. Figures are written as they
come, to benchmarks/results/gpu-<card>.json; a second call goes on where the first one stopped.
"""

import argparse
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT_S = 475  # all stages of one call, without the plan
COLUMNS = ("what", "measured", "of peak", "GiB", "planned GiB", "goal", "note")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for; return 1 where one of them did not end well."""
    args = parsed(arguments)
    if args.child:
        return child(args)
    from gpu_stages import STAGES

    asked = set(args.stages.split(",")) if args.stages else STAGES.keys()
    if unknown := asked - STAGES.keys():
        sys.exit(f"--stages: there is no stage {min(unknown)}; the stages are {', '.join(STAGES)}")
    facts, well = about(), True
    if "plan" in asked:
        well = take("plan", args, args.plan, facts, STAGES["plan"].limit_s)
    if names := [name for name in STAGES if name in asked and name != "plan"]:
        if args.device == "cuda":
            facts["card"], facts["card_gib"] = card()
        path = args.out / f"gpu-{re.sub('[^a-z0-9]+', '-', facts.get('card', 'cpu').lower())}.json"
        end, patience = (time.monotonic() + LIMIT_S, 1) if args.device == "cuda" else (math.inf, 10)
        for name in names:
            limit = min(patience * STAGES[name].limit_s, end - time.monotonic())
            well = take(name, args, path, facts, limit) and well
        print(table(read(path)))
    return int(not well)


def take(name: str, args: argparse.Namespace, path: Path, facts: dict[str, Any], limit: float) -> bool:
    """Run a stage, unless it is done, and write what it left; tell whether it is done."""
    from align_cluster.files import write_json

    kept = read(path)
    stage = {} if args.again else kept["stages"].get(name, {})
    if stage.get("state") == "done":
        print(f"{name}: done before", file=sys.stderr, flush=True)
        return True
    print(f"{name} ...", file=sys.stderr, flush=True)
    stage = run(name, args, stage.get("rows", {}), limit)
    write_json(path, {**kept, **facts, "stages": kept["stages"] | {name: stage}})
    return stage["state"] == "done"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; --child is for the stages' own processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", help="some of them, with commas between (default: all)")
    parser.add_argument("--again", action="store_true", help="measure stages that are done once more")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="networks of a test's size")
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/; with --tiny a new one)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu is for a rehearsal: add --tiny")
    args.out = args.out or (Path(tempfile.mkdtemp(prefix="gpu-tiny-")) if args.tiny else HERE / "results")
    args.plan = (args.out if args.tiny else HERE / "results") / "gpu-plan.json"
    return args


def run(name: str, args: argparse.Namespace, rows: dict[str, Any], limit: float) -> dict[str, Any]:
    """Run one stage in a process of its own for at most `limit` seconds; return its state and its rows."""
    started, environment = time.monotonic(), dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), environment.get("PYTHONPATH", "")])
    if args.device == "cpu" or name == "plan":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({"done": [key for key, row in rows.items() if "error" not in row]}))
        command = [sys.executable, str(HERE / "gpu.py"), "--stages", name, "--child", str(job), "--out", str(args.out)]
        command += ["--device", args.device, *(["--tiny"] if args.tiny else [])]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            code = process.wait(max(0.0, limit))
            state = "done" if code == 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            state = f"stopped at its limit of {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = job.with_name("rows.jsonl")
        whole = found.read_text().rpartition("\n")[0] if found.exists() else ""  # the last line may be cut off
    for line in whole.splitlines():
        row = json.loads(line)
        rows[row.pop("name")] = row
    if failed := sum("error" in row for row in rows.values()):
        state += f", {failed} figures failed"
    return {"state": state, "seconds": round(time.monotonic() - started, 1), "date": str(date.today()), "rows": rows}


def child(args: argparse.Namespace) -> int:
    """Be the process of one stage."""
    from gpu_bench import Bench
    from gpu_stages import STAGES

    planned = read(args.plan)["stages"].get("plan", {}).get("rows", {})
    done = frozenset(json.loads(args.child.read_text())["done"])
    bench = Bench(args.device, args.tiny, args.child.with_name("rows.jsonl"), done, planned)
    STAGES[args.stages].run(bench)
    return 0


def card() -> tuple[str, float]:
    """Return the first card's name and GiB, by NVIDIA's tool: CUDA would hold memory in this process for all stages."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        sys.exit("nvidia-smi finds no card here; rehearse with --tiny --device cpu, or plan with --stages plan")
    name, size = line.rsplit(", ", 1)
    return name, round(float(size) / 1024, 1)


def about() -> dict[str, Any]:
    """Return what figures depend on besides the card."""
    from common import commit

    from align_cluster.cluster.nodes import software

    here = commit() if shutil.which("git") else ""
    return {"commit": here, "python": platform.python_version(), "versions": software()}


def read(path: Path) -> dict[str, Any]:
    """Return a file of results, or one without stages where there is none."""
    return json.loads(path.read_text()) if path.exists() else {"stages": {}}


def table(kept: dict[str, Any]) -> str:
    """Write all figures as one Markdown table."""
    lines = [f"{kept.get('card', 'CPU')}, commit {kept.get('commit')}", ""]
    lines += [_line(COLUMNS), _line("---" for _ in COLUMNS)]
    for name, stage in kept["stages"].items():
        lines.append(_line([f"**{name}**", f"{stage['state']}, {stage['seconds']} s", *[""] * 5]))
        lines += [_line(_cells(label, row)) for label, row in stage["rows"].items()]
    return "\n".join(lines)


def _cells(label: str, row: dict[str, Any]) -> list[str]:
    if reason := row.get("error") or row.get("skipped"):
        return [label, "failed" if "error" in row else "skipped", "", "", "", "", reason.replace("|", "/")]
    measured = f"{row['value']:.4g} {row['unit']}"
    share = f"{100 * row['of_peak']:.1f} %" if "of_peak" in row else ""
    memory = [f"{row[key]:.2f}" if key in row else "" for key in ("gib", "planned_gib")]
    return [label, measured, share, *memory, row.get("goal", ""), row.get("note", "")]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
