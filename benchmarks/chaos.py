"""Does a run that loses workers all the time end as one that loses none? A seeded storm over a real run.

    python benchmarks/chaos.py run              # about a quarter of an hour on two cores
    python benchmarks/chaos.py run --steps 6 --kills sampler=3 reward=2    # a check that it works
    python benchmarks/chaos.py table            # the kept figures as Markdown

The same small run of the embedded model is made twice: undisturbed, and with a schedule of kills that the seed decides.
A kill is a SIGKILL to a sampler, a reward worker, a rank of the learner, or the driver, at a moment of a step: before,
in or after its rollout, scoring, update or publish. Victims are found by what the run knows of its workers. A driver
that is gone is started again with `train --resume auto`, as a job queue would. Each step has kills of one kind alone,
so the time that it takes longer than without is what they cost.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import ray
from common import commit
from hooked import HookedWorkers

from align_cluster.config.load import load
from align_cluster.config.run import RunConfig
from align_cluster.loop import driver
from align_cluster.observe.sinks import append_jsonl, read_jsonl

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "chaos.json"
OVERRIDES = (
    "name=chaos",
    "prompts_per_step=4",
    "rollout.group_size=4",
    "rollout.steps=4",
    "learner.updates_per_step=1",
    "checkpoint.every=1",
    "cluster.samplers=2",
    "cluster.learners=2",
    "cluster.reward_workers=2",
    "rewards.geneval.on_failure.retries=6",  # a call that loses more workers is a failed score
    "rewards.clip.on_failure.retries=6",
    "evaluate.count=2",
    "evaluate.images_per_prompt=1",
    "evaluate.grid_every=0",
    "evaluate.grid_prompts=1",
    "evaluate.grid_columns=1",
)
KILLS = {"sampler": 24, "reward": 20, "learner": 4, "driver": 3}
AT_ONCE = {"sampler": 2, "reward": 2, "learner": 1, "driver": 1}  # kills of a kind in one step
MOMENTS = (
    "before rollout",
    "in rollout",
    "in scoring",
    "before update",
    "in update",
    "after update",
    "in publish",
    "after publish",
)
IN_UPDATE_S = 0.1  # an update takes longer


@dataclass(frozen=True)
class Kill:
    """One planned kill: in training step `step` (1 ...), at a moment; `pick` says which of those there are."""

    id: int
    step: int
    moment: str
    kind: str
    pick: int


def schedule(seed: int, steps: int, counts: dict[str, int]) -> list[Kill]:
    """Kills by step; the same for the same arguments. ValueError where the steps do not suffice."""
    chance = random.Random(seed)
    rounds = [
        (kind, min(AT_ONCE[kind], count - start))
        for kind, count in counts.items()
        for start in range(0, count, AT_ONCE[kind])
    ]
    if len(rounds) > steps:
        raise ValueError(f"{len(rounds)} steps are needed for one kind of kill a step; give --steps {len(rounds)}")
    chance.shuffle(rounds)
    kills: list[Kill] = []
    for step, (kind, count) in zip(sorted(chance.sample(range(1, steps + 1), len(rounds))), rounds, strict=True):
        for moment in sorted(chance.sample(MOMENTS, count), key=MOMENTS.index):
            kills.append(Kill(len(kills), step, moment, kind, chance.randrange(2**16)))
    return kills


def saboteur(folder: Path) -> type[HookedWorkers]:
    """A worker group that carries out the folder's schedule, and keeps record of its kills and of finished steps."""
    left = {kill["id"]: Kill(**kill) for kill in json.loads((folder / "schedule.json").read_text())}
    for row in read_jsonl(folder / "kills.jsonl"):
        left.pop(row["id"])

    class Saboteur(HookedWorkers):
        drawing = step = 0  # the steps that are drawn and trained

        def strike(self, moment: str, step: int, after_s: float = 0.0) -> None:
            for kill in [kill for kill in left.values() if (kill.step, kill.moment) == (step, moment)]:
                del left[kill.id]
                if after_s:
                    threading.Timer(after_s, self.carry_out, [kill]).start()
                else:
                    self.carry_out(kill)

        def carry_out(self, kill: Kill) -> None:
            victims = [(name, victim) for name, victim in self.victims(kill.kind) if alive(victim)]
            if not victims:  # the ones before are not buried yet
                left[kill.id] = replace(kill, step=kill.step + 1)
                return
            name, victim = victims[kill.pick % len(victims)]
            append_jsonl(folder / "kills.jsonl", asdict(kill) | {"victim": name, "at": time.time()})
            if isinstance(victim, int):
                os.kill(victim, signal.SIGKILL)
            else:
                ray.kill(victim)

        def victims(self, kind: str) -> list[tuple[str, Any]]:
            """Names and processes of those whom a kill may hit, or the actor of one that is only starting: those with
            work where there are any."""
            if kind == "driver":
                return [("driver", os.getpid())]
            if kind == "learner":
                return [(f"learner-{rank}", process(home)) for rank, home in enumerate(self.ranks.locations)]
            workers = self.samplers.workers if kind == "sampler" else self.rewards[0].workers
            workers = [worker for worker in workers if worker.calls] or workers
            return [(worker.name, process(worker.location) if worker.location else worker.actor) for worker in workers]

        def begin(self, chunks, request):
            self.drawing = chunks[0].step + 1  # of an evaluation, a number that no kill has
            self.strike("before rollout", self.drawing)
            return super().begin(chunks, request)

        def collect(self, drawing):
            rollout = super().collect(drawing)
            ids = [list(item.chunk.id) for item in rollout.drawn]
            if ids[0][0] >= 0:
                append_jsonl(folder / "drawn.jsonl", {"step": ids[0][0] + 1, "chunks": ids})
            return rollout

        def report(self, stage, done, total):
            super().report(stage, done, total)
            if stage == "rollout" and done == total // 2:
                self.strike("in rollout", self.drawing)
            if stage == "rollout" and done == total:
                self.strike("in scoring", self.drawing)

        def update(self, step, drawn, credit):
            self.step = step + 1
            self.strike("before update", self.step)
            self.strike("in update", self.step, IN_UPDATE_S)
            trained = super().update(step, drawn, credit)
            self.strike("after update", self.step)
            return trained

        def publish(self, source):
            self.strike("in publish", self.step, 0.01)
            sync = super().publish(source)
            self.strike("after publish", self.step)
            if source == "behaviour" and self.step:
                append_jsonl(folder / "published.jsonl", {"step": self.step, "at": time.time()})
            return sync

    return Saboteur


def alive(victim: Any) -> bool:
    return not isinstance(victim, int) or Path(f"/proc/{victim}").exists()


def process(place: str) -> int:
    """The process id in what a pool says of where a worker is."""
    return int(place.rsplit(" ", 1)[1])


def config_of(steps: int, ahead: int) -> RunConfig:
    return load(ROOT / "configs/quickstart.yaml", [*OVERRIDES, f"steps={steps}", f"loop.ahead={ahead}"])


def drive(folder: Path, steps: int, ahead: int) -> None:
    """One life of the driver: from the start, or from where the one before was killed."""
    driver.WorkerGroup = saboteur(folder)
    driver.train(config_of(steps, ahead), folder, "auto")


def lives(folder: Path, steps: int, ahead: int) -> tuple[dict[str, Any], int, float]:
    """Summary of the run in `folder`, how many drivers it took, and seconds in all."""
    began, count, command = time.monotonic(), 0, [sys.executable, __file__, "drive", str(folder)]
    command += ["--steps", str(steps), "--ahead", str(ahead)]
    while True:
        count += 1
        with (folder / f"log-{count}.txt").open("w") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        if code == 0:
            (path,) = folder.glob("chaos*/summary.json")
            return json.loads(path.read_text()), count, time.monotonic() - began
        if code != -signal.SIGKILL:
            raise RuntimeError(f"the driver ended with {code}: {(folder / f'log-{count}.txt').read_text()[-2000:]}")


def step_seconds(folder: Path) -> dict[int, float]:
    """How long each step took: from the end of the one before to its own, whatever happened between."""
    ends = {row["step"]: row["at"] for row in read_jsonl(folder / "published.jsonl")}
    return {step: ends[step] - ends[step - 1] for step in sorted(ends) if step - 1 in ends}


def storm(seed: int, steps: int, ahead: int, counts: dict[str, int], out: Path) -> dict[str, Any]:
    """Both runs, and what came of them."""
    kills, found = schedule(seed, steps, counts), {}
    for name, planned in (("quiet", []), ("stormy", kills)):
        folder = out / name
        folder.mkdir(parents=True)
        (folder / "schedule.json").write_text(json.dumps([asdict(kill) for kill in planned]))
        found[name] = lives(folder, steps, ahead)
    (quiet, _, quiet_s), (stormy, drivers, stormy_s) = found["quiet"], found["stormy"]
    done = read_jsonl(out / "stormy" / "kills.jsonl")
    usual, longer = statistics.median(step_seconds(out / "quiet").values()), step_seconds(out / "stormy")
    per_kind = {}
    for kind in counts:
        by_step = {row["step"]: [r for r in done if r["step"] == row["step"]] for row in done if row["kind"] == kind}
        lost = [(longer[step] - usual) / len(rows) for step, rows in by_step.items() if step in longer]
        total = sum(row["kind"] == kind for row in done)
        per_kind[kind] = {"kills": total, "lost_s": statistics.mean(lost) if lost else None}
    return {
        "seed": seed,
        "steps": steps,
        "ahead": ahead,
        "images_per_step": 16,
        "planned": len(kills),
        "kills": len(done),
        "moments": {moment: sum(row["moment"] == moment for row in done) for moment in MOMENTS},
        "drivers": drivers,
        "weights_equal": quiet["lora_checksum"] == stormy["lora_checksum"],
        "held_out_equal": quiet["after"] == stormy["after"],
        **accounts(out),
        "quiet_s": quiet_s,
        "stormy_s": stormy_s,
        "quiet_step_s": usual,
        "lost_s_per_kill": (stormy_s - quiet_s) / max(1, len(done)),
        "per_kind": per_kind,
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores",
    }


def accounts(out: Path) -> dict[str, int]:
    """Steps and groups of the stormy run against those of the quiet one. What a killed driver had not yet saved is done
    again by the next one, and counts as `repeated_steps`."""
    steps, chunks, repeated = {}, {}, 0
    for name in ("quiet", "stormy"):
        (metrics,) = (out / name).glob("chaos*/metrics.jsonl")
        steps[name] = [row["step"] for row in read_jsonl(metrics)]
        rows = read_jsonl(out / name / "drawn.jsonl")
        chunks[name] = {row["step"]: [tuple(chunk) for chunk in row["chunks"]] for row in rows}  # the last time counts
        repeated = len(rows) - len(chunks[name])
    pairs = [(chunks["quiet"][step], chunks["stormy"].get(step, [])) for step in chunks["quiet"]]
    return {
        "steps_lost": len(set(steps["quiet"]) - set(steps["stormy"])),
        "steps_doubled": len(steps["stormy"]) - len(set(steps["stormy"])),
        "groups_lost": sum(len(set(one) - set(other)) for one, other in pairs),
        "groups_doubled": sum(len(other) - len(set(other)) for _, other in pairs),
        "repeated_steps": repeated,
    }


def table(found: dict[str, Any]) -> Iterator[str]:
    """The figures as Markdown."""
    yield "| what | measured |"
    yield "|---|---|"
    yield f"| kills, in {found['steps']} steps | {found['kills']} |"
    yield f"| steps lost, doubled | {found['steps_lost']}, {found['steps_doubled']} |"
    yield f"| groups lost, doubled | {found['groups_lost']}, {found['groups_doubled']} |"
    yield f"| final LoRA equal to the quiet run's, bit by bit | {'yes' if found['weights_equal'] else 'NO'} |"
    yield f"| held-out scores equal | {'yes' if found['held_out_equal'] else 'NO'} |"
    yield f"| steps that a killed driver had not saved, and that were done again | {found['repeated_steps']} |"
    yield f"| wall time, quiet / stormy | {found['quiet_s']:.0f} / {found['stormy_s']:.0f} s |"
    yield f"| a step of the quiet run | {found['quiet_step_s']:.1f} s |"
    yield f"| time lost a kill | {found['lost_s_per_kill']:.1f} s |"
    for kind, figures in found["per_kind"].items():
        if figures["lost_s"] is not None:
            yield f"| of the {kind}: {figures['kills']} kills, each | {figures['lost_s']:.1f} s |"


def parse_kills(texts: list[str]) -> dict[str, int]:
    counts = {kind: int(count) for kind, _, count in (text.partition("=") for text in texts)}
    if unknown := counts.keys() - AT_ONCE.keys():
        raise SystemExit(f"--kills knows {', '.join(AT_ONCE)}, not {', '.join(unknown)}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "drive"])
    parser.add_argument("folder", nargs="?", type=Path, help="of `drive`, which `run` calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--ahead", type=int, choices=[0, 1], default=0, help="loop.ahead; 1 keeps no figures")
    parser.add_argument("--kills", nargs="+", metavar="KIND=COUNT", help="other than the kept run's")
    args = parser.parse_args()
    if args.what == "drive":
        drive(args.folder, args.steps, args.ahead)
    elif args.what == "table":
        print("\n".join(table(json.loads(RESULTS.read_text()))))
    else:
        counts = parse_kills(args.kills) if args.kills else KILLS
        with tempfile.TemporaryDirectory(prefix="ac-chaos-", dir="/tmp") as folder:
            found = storm(args.seed, args.steps, args.ahead, counts, Path(folder))
        if not (args.kills or args.ahead):
            RESULTS.write_text(json.dumps(found, indent=2) + "\n")
        print("\n".join(table(found)))
        if not (found["weights_equal"] and not found["steps_lost"] and not found["groups_lost"]):
            sys.exit("the stormy run ended otherwise than the quiet one")


if __name__ == "__main__":
    main()
