"""The commands that take a run file, and those that take what a run left.

Each command takes the parsed arguments and returns the exit code. Everything heavy is imported inside the functions, so
that `align-cluster --help` answers at once.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from align_cluster.cli.inputs import config_of, load_file, source_of

if TYPE_CHECKING:
    from align_cluster.cluster.preload import Preload
    from align_cluster.config.run import RunConfig


def init(args: argparse.Namespace) -> int:
    """Copy a shipped run file or service file, and say how to go on."""
    from align_cluster.config.shipped import copy

    out = args.out or Path(f"{args.name}.yaml")
    command = "serve-rewards" if copy(args.name, out, args.force) else "train"
    print(
        f"{out} is a copy of {args.name}, and its schema for editors stands beside it: change it, then "
        f"`align-cluster {command} {shlex.quote(str(out))}`"
    )
    return 0


@contextmanager
def _preloaded(args: argparse.Namespace) -> "Iterator[tuple[RunConfig, Preload | None]]":
    """Yield the checked config of a command that starts workers, and what these are forks of on a private Ray."""
    from align_cluster.cluster.preload import imports, preload
    from align_cluster.cluster.sealing import check

    with preload() as ready:
        config = config_of(args)
        check(config)
        if ready and config.cluster.address:
            ready.close()
        elif ready:
            ready.load(imports(config))
        yield config, ready


def train(args: argparse.Namespace) -> int:
    """Run an alignment job. What its workers import is being imported while this process finds out what the job is."""
    from align_cluster.interrupts import interruptible
    from align_cluster.observe.logs import as_json

    began = time.monotonic()
    if not as_json():
        print(f"reading {args.config}", flush=True)  # importing what reads it takes seconds
    with interruptible(alone=True), _preloaded(args) as (config, ready):
        from align_cluster.files import user_path
        from align_cluster.loop.driver import train

        train(config, user_path(config.out), args.resume, ready, began)
    return 0


def scale(args: argparse.Namespace) -> int:
    """Run a job for a few steps on several numbers of nodes, and print what each of them brings."""
    from align_cluster.interrupts import interruptible

    with interruptible(alone=True):
        from rich.console import Console

        if args.address:
            args.set = [*args.set, f"cluster.address={json.dumps(args.address)}"]
        with _preloaded(args) as (config, ready):
            from align_cluster.config.run import RunConfig
            from align_cluster.scaling import experiment, on_this_machine, table

            def load(more: list[str]) -> RunConfig:
                return load_file(args.config, [*args.set, *more], RunConfig)

            folder = args.folder or Path(f"{config.name}-scale")
            found = experiment(load, sorted(set(args.nodes)), not args.strong, args.steps, folder, ready)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    Console().print(table(found))
    if on_this_machine(config):
        print(
            "These nodes share one machine: this shows what more workers and placement cost here, and nothing of a "
            "network or of memory that each node has to itself."
        )
    print(f"{folder}: scale.json, scale.svg")
    return 0


def validate(args: argparse.Namespace) -> int:
    """Check a run file, and print one line about it or all of its settings."""
    from align_cluster.config.load import dump

    config = config_of(args)
    if args.resolved:
        print(dump(config), end="")
        return 0
    images = config.prompts_per_step * config.group_members
    print(
        f"{args.config} is valid: {config.algorithm.kind} on {config.backbone.path}, {config.steps} steps of {images} "
        f"images ({config.prompts_per_step} prompts x {config.group_members})"
    )
    return 0


def plan(args: argparse.Namespace) -> int:
    """Print the pools and batches of a run, and its memory and FLOPs where the base model's settings can be read."""
    from dataclasses import asdict

    from align_cluster.config.plan import Rows, derive, local_resources, table
    from align_cluster.errors import UserError
    from align_cluster.planner.batches import rows_that_fit
    from align_cluster.planner.report import GIB, estimate, local_gpu, text
    from align_cluster.planner.work import learner_work

    config = config_of(args)
    cores, gpus = local_resources()
    name, memory = local_gpu()
    if args.gpu_memory:
        gpus, memory = max(gpus, 1), args.gpu_memory * GIB
    cores, gpus = args.cores or cores, gpus if args.gpus is None else args.gpus
    rows = Rows()
    if gpus and memory:
        with suppress(UserError):  # the estimate below meets the same error, and says it
            rows = rows_that_fit(config, cores, gpus, memory)
    work = 1.0
    with suppress(UserError):
        work = learner_work(config, cores, gpus, rows)
    plan = derive(config, cores, gpus, rows, work)
    if not args.json:
        print(table(plan), flush=True)  # what comes next takes a while
    try:
        found = estimate(plan.config, plan, memory, name)
    except UserError as error:
        print(f"note: memory and FLOPs are not known: {error}", file=sys.stderr)
        found = None
    if args.json:
        facts = asdict(plan) | {"estimate": found and asdict(found) | {"fits": found.fits}}
        print(json.dumps({name: fact for name, fact in facts.items() if name != "config"}, indent=2))
    elif found:
        print(f"\n{text(plan.config, plan, found)}")
    return 0


def sample(args: argparse.Namespace) -> int:
    """Draw images into a new folder, and print where they are and what they scored."""
    from align_cluster.backbones import BACKBONES
    from align_cluster.errors import UserError
    from align_cluster.evaluate.sample import SampleRequest, read_prompts, sample
    from align_cluster.evaluate.steer import SavedCritic, describe_compute, read_settings

    prompts = read_prompts(args.prompt, args.prompts)
    of_mode = [override for override in args.set if override.startswith("steer.")]
    if of_mode and not args.steer:
        raise UserError(f"--set {of_mode[0]} needs --steer with the name of a mode, such as --steer best_of_n")
    steer = read_settings(args.steer, of_mode) if args.steer else None
    with source_of(args, [override for override in args.set if override not in of_mode]) as source:
        config = source.config
        request = SampleRequest(
            prompts=prompts,
            count=args.count,
            seed=args.seed,
            steps=args.steps,
            guidance=args.guidance,
            compare=bool(args.compare),
            score=not args.no_score,
            steer=steer,
            critic=SavedCritic.read(source.folder, config, source.checkpoint) if steer else None,
        )
    backbone = BACKBONES[config.backbone.kind](config.backbone)
    for note in backbone.text_notes([prompt.text for prompt in prompts]):
        print(f"note: {note}", file=sys.stderr)
    names = (Path(f"samples-{number}" if number > 1 else "samples") for number in count(1))
    out = args.out or next(path for path in names if not path.exists())
    drawn = sample(config, source.lora, request, out)
    print(f"{len(drawn['images'])} images in {out}, overview in {out / 'grid.png'}")
    for model, means in drawn["means"].items():
        if means:
            print("".join([f"{model}:", *(f"  {name} {mean:.3f}" for name, mean in means.items())]))
    if steer:
        spent, plain = (describe_compute(drawn["steer"][side]) for side in ("compute", "plain"))
        print(f"{steer.kind}: {spent}; plain sampling: {plain}")
    return 0


def export(args: argparse.Namespace) -> int:
    """Write a run's result for other tools into a new folder."""
    from align_cluster.evaluate.export import export

    names = {"base_model": args.base_model, "license": args.license}
    for note in export(args.run, args.to, args.out, precision=args.precision, overrides=args.set, **names):
        print(f"note: {note}", file=sys.stderr)
    print(f"{args.to} in {args.out}, described in {args.out / 'README.md'}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Score held-out prompts, and print the scores as a table or as JSON."""
    from rich.console import Console

    from align_cluster.evaluate.local import evaluate
    from align_cluster.files import writable, write_json
    from align_cluster.observe.table import evaluation_tables

    with source_of(args, args.set) as source:
        config, lora = source.config, source.lora
    if args.out:
        writable(args.out)  # an evaluation of hours should not end at a typo
    scores = evaluate(config, lora)
    if args.out:
        write_json(args.out, scores)
    if args.json:
        print(json.dumps(scores, indent=2))
    else:
        console, drawn_with = Console(), lora.path if lora else "base model"
        console.print(evaluation_tables(scores, console.width, f"held-out scores, {drawn_with}"))
    return 0
