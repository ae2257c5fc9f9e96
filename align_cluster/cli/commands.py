"""The commands of the command line: each function takes the parsed arguments and returns the exit code.

Everything heavy is imported inside the functions, so that `align-cluster --help` answers at once.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from align_cluster.backbones.lora_file import Lora
    from align_cluster.config.load import Settings
    from align_cluster.config.run import RunConfig
    from align_cluster.serving.config import ServiceConfig
    from align_cluster.settings import Section


class Source(NamedTuple):
    """Says what CONFIG|RUN, --lora and --base name: settings, a LoRA if any, and the folder of the settings.

    `checkpoint` is how users call the folder where it is unfolded from a checkpoint.
    """

    config: "RunConfig"
    lora: "Lora | None"
    folder: Path
    checkpoint: Path | None


def _load(path: str | Path, overrides: Sequence[str], model: "type[Settings]") -> "Settings":
    """Load a file of settings. Raises UserError, which says so where it is the file of another command."""
    from align_cluster.config.load import is_rather, load
    from align_cluster.config.run import RunConfig
    from align_cluster.errors import UserError
    from align_cluster.serving.config import ServiceConfig

    try:
        return load(path, overrides, model)
    except UserError:
        other = ServiceConfig if model is RunConfig else RunConfig
        if not is_rather(path, other, model):
            raise
        does = "checks and serves it" if other is ServiceConfig else "checks it"
        raise UserError(
            f"{path} describes {other.what}, and this command takes the file of {model.what}, such as {model.sample}; "
            f"`align-cluster {'serve-rewards' if other is ServiceConfig else 'validate'} {path}` {does}"
        ) from None


def _config(args: argparse.Namespace) -> "RunConfig":
    """Load and check the config that CONFIG, --set, --name and --out describe; notes go to stderr."""
    from align_cluster.config.check import check
    from align_cluster.config.run import RunConfig

    overrides = list(args.set)
    for key in ("name", "out"):
        if getattr(args, key, None) is not None:
            overrides.append(f"{key}={json.dumps(getattr(args, key))}")
    config = _load(args.config, overrides, RunConfig)
    for note in check(config):
        print(f"note: {note}", file=sys.stderr)
    return config


@contextmanager
def _source(args: argparse.Namespace, overrides: Sequence[str]) -> Iterator[Source]:
    """Find and load what CONFIG|RUN, --lora and --base name. Raises UserError where they name none or two."""
    from align_cluster.backbones.lora_file import read_lora
    from align_cluster.config.run import RunConfig
    from align_cluster.errors import UserError
    from align_cluster.evaluate.checkpoints import opened
    from align_cluster.evaluate.lora import find_config, find_lora
    from align_cluster.observe.rundir import RunDir

    named, source = args.target, getattr(args, "source", None)
    if named and source or not (named or source or args.lora):
        raise UserError("name one model: --run with a run's folder, --config with a run file, or --lora")
    with ExitStack() as stack:
        lora = stack.enter_context(opened(args.lora)) if args.lora else None
        target = stack.enter_context(opened(named or source)) if named or source else lora
        for given, found in ((args.lora, lora), (named or source, target)):
            if given and found.checkpoint and str(found.checkpoint) != given:  # @best, by its step
                print(f"note: {given} is {found.checkpoint}", file=sys.stderr)
        file = find_config(lora.path) if target is lora else target.path
        if file.is_dir():
            file, lora = RunDir(file).config, lora or (None if args.base else target)
        weights = read_lora(find_lora(lora.path), lora.checkpoint) if lora else None
        yield Source(_load(file, overrides, RunConfig), weights, file.parent, target.checkpoint)


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


def train(args: argparse.Namespace) -> int:
    """Run an alignment job. What its workers import is being imported while this process finds out what the job is."""
    from align_cluster.interrupts import interruptible
    from align_cluster.observe.logs import as_json

    began = time.monotonic()
    if not as_json():
        print(f"reading {args.config}", flush=True)  # importing what reads it takes seconds
    with interruptible(alone=True):
        from align_cluster.cluster.preload import imports, preload
        from align_cluster.cluster.sealing import check

        with preload() as ready:
            config = _config(args)
            check(config)
            if ready and config.cluster.address:
                ready.close()
            elif ready:
                ready.load(imports(config))
            from align_cluster.files import user_path
            from align_cluster.loop.driver import train

            train(config, user_path(config.out), args.resume, ready, began)
    return 0


def scale(args: argparse.Namespace) -> int:
    """Run a job for a few steps on several numbers of nodes, and print what each of them brings."""
    from align_cluster.interrupts import interruptible

    with interruptible(alone=True):
        from rich.console import Console

        from align_cluster.cluster.preload import imports, preload
        from align_cluster.cluster.sealing import check

        with preload() as ready:
            here = [f"cluster.address={json.dumps(args.address)}"] if args.address else []
            args.set = [*args.set, *here]
            config = _config(args)
            check(config)
            if ready and config.cluster.address:
                ready.close()
            elif ready:
                ready.load(imports(config))
            from align_cluster.config.run import RunConfig
            from align_cluster.scaling import experiment, table

            def load(more: list[str]) -> RunConfig:
                return _load(args.config, [*args.set, *more], RunConfig)

            folder = args.folder or Path(f"{config.name}-scale")
            found = experiment(load, sorted(set(args.nodes)), not args.strong, args.steps, folder, ready)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    Console().print(table(found))
    if not (config.cluster.address or os.environ.get("RAY_ADDRESS")):
        print(
            "These nodes share one machine: this shows what more workers and placement cost here, and nothing of a "
            "network or of memory that each node has to itself."
        )
    print(f"{folder}: scale.json, scale.svg")
    return 0


def validate(args: argparse.Namespace) -> int:
    """Check a run file, and print one line about it or all of its settings."""
    from align_cluster.config.load import dump

    config = _config(args)
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

    config = _config(args)
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
    with _source(args, [override for override in args.set if override not in of_mode]) as source:
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

    with _source(args, args.set) as source:
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


def submit(args: argparse.Namespace) -> int:
    """Run `train` as a job on a Ray cluster, and follow its log unless --no-wait is given; or follow an earlier job."""
    if args.follow:
        from align_cluster.cluster.jobs import connect, follow

        return follow(connect(args.address), args.follow)
    from align_cluster.cluster.submit import submit

    return submit(
        _config(args),
        args.address,
        args.file,
        not args.no_wait,
        args.python,
        args.resume,
        args.env,
        args.runtime_env,
        args.with_code,
    )


def serve_rewards(args: argparse.Namespace) -> int:
    """Serve rewards over HTTP until interrupted."""
    from align_cluster.errors import RETRY, Preempted
    from align_cluster.interrupts import begun, interruptible

    print(f"reading {args.config}", flush=True)  # importing what reads it takes seconds
    try:
        with interruptible(alone=True):
            run, config = _service(args)
            begun()
            run(config)
    except Preempted:
        print("ended by SIGTERM before the service was ready", file=sys.stderr)
        return RETRY
    return 0


def _service(args: argparse.Namespace) -> tuple[Callable[["ServiceConfig"], None], "ServiceConfig"]:
    """Load what runs a service, and its file."""
    from align_cluster.config.check import check_settings
    from align_cluster.errors import UserError
    from align_cluster.serving.config import ServiceConfig

    config = _load(args.config, args.set, ServiceConfig)
    check_settings(config)
    try:
        from align_cluster.serving.service import run
    except ImportError as error:
        raise UserError(f"serving needs the package {error.name}; pip install 'align-cluster[serve]'") from None
    return run, config


def score(args: argparse.Namespace) -> int:
    """Score image files with a reward of a service; the exit code is 1 where the reward failed."""
    from align_cluster.errors import UserError
    from align_cluster.plain import json_value
    from align_cluster.rewards.base import RewardError
    from align_cluster.rewards.http import RewardClient, Token, Unauthorized, read_image
    from align_cluster.rewards.wire import one_line
    from align_cluster.types import Prompt

    try:
        metadata = json_value(args.metadata)
        if not isinstance(metadata, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise UserError(
            f'--metadata {one_line(args.metadata)}: write it as a JSON object such as \'{{"text": "OPEN"}}\' '
            f"({one_line(error)})"
        ) from None
    prompt = Prompt(0, args.prompt, metadata)
    token = Token(env=args.token_env, file=args.token_file).read() if args.token_env or args.token_file else None
    client = RewardClient(args.url, token, timeout_s=args.timeout)
    rows: list[dict[str, Any]] = []
    for path in args.images:
        image = read_image(path)
        try:
            scores = client.score([args.reward], image[None], [prompt])
        except Unauthorized as error:
            given = "correct what the given variable or file holds" if token else "name its variable with --token-env"
            raise UserError(f"{path} has no score: {error}; {given}") from None
        except RewardError as error:
            raise UserError(f"{path} has no score: {error}") from None
        failure = scores.failures.get(args.reward)
        value = float(scores.values[args.reward][0]) if scores.valid[args.reward][0] else None
        rows.append({"image": str(path), "score": value, "failure": failure and failure.message})
    if any(row["score"] is None and not row["failure"] for row in rows):
        with suppress(RewardError):  # the scores are here, and count without the note
            for name, meaning in client.metadata(args.reward).items():
                print(f"note: {args.reward} reads {name} of --metadata: {meaning}", file=sys.stderr)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            score = f"{row['score']:.4f}" if row["score"] is not None else row["failure"] or "does not apply"
            print(f"{score}  {row['image']}")
    return 1 if any(row["failure"] for row in rows) else 0


def doctor(args: argparse.Namespace) -> int:
    """Check this machine, a cluster or a run; the exit code is 1 where a check fails."""
    from align_cluster.cluster.checks import render
    from align_cluster.cluster.doctor import examine
    from align_cluster.cluster.run_status import examine_run
    from align_cluster.errors import UserError

    if args.run and (args.address or args.config):
        given = "--address" if args.address else "--config"
        raise UserError(f"doctor RUN looks at what {args.run} does; leave {given} out, or RUN, to look at a cluster")
    if args.config and not args.address:
        raise UserError("--config is tried on a cluster; add --address auto, or ask `plan` about this machine")
    if args.run:
        checks = examine_run(args.run)
    else:
        checks = examine(args.address, args.quick, _config(args) if args.config else None)
    print(render(checks, as_json=args.json))
    return 1 if any(check.state == "fail" for check in checks) else 0


def report(args: argparse.Namespace) -> int:
    """Write a run's report again, or a page about two runs, and print where it is."""
    from align_cluster.observe.report import write_report

    runs = [args.run, *([args.other] if args.other else [])]
    beside = args.run / f"report-{args.other.resolve().name}.html" if args.other else None
    print(write_report(*runs, out=args.out or beside))
    return 0


def schema(args: argparse.Namespace) -> int:
    """Print the JSON schema of run files or service files."""
    from align_cluster.config.reference import json_schema
    from align_cluster.config.run import RunConfig
    from align_cluster.serving.config import ServiceConfig

    print(json.dumps(json_schema(ServiceConfig if args.service else RunConfig), indent=2))
    return 0


def explain(args: argparse.Namespace) -> int:
    """Print the settings of one block of a run file, or of a service file, with what they mean."""
    from align_cluster.config.reference import explain
    from align_cluster.config.run import RunConfig
    from align_cluster.serving.config import ServiceConfig

    print(explain(args.topic, ServiceConfig) if args.service else explain(args.topic, RunConfig, elsewhere()))
    return 0


def elsewhere() -> "dict[str, type[Section]]":
    """Return the blocks that no run file holds, by the path under which `explain` has them: those of --steer, and the
    clauses in lines of prompt files."""
    from align_cluster.prompts.files import CLAUSES
    from align_cluster.rollouts.steering import STEERING

    return {f"prompts.jsonl.{name}": clause for name, clause in CLAUSES.items()} | {
        f"steer.{mode}": steering.Config for mode, steering in STEERING.items()
    }


def list_kinds(args: argparse.Namespace) -> int:
    """Print the kinds of one part, or the shipped run files, with a line about each."""
    from align_cluster.algorithms import ALGORITHMS
    from align_cluster.backbones import BACKBONES
    from align_cluster.config.reference import columns, kinds
    from align_cluster.config.shipped import summaries
    from align_cluster.prompts import PROMPTS
    from align_cluster.rewards import REWARDS
    from align_cluster.rollouts.schedule import SCHEDULES
    from align_cluster.rollouts.steps import STEPS
    from align_cluster.rollouts.windows import WINDOWS

    parts = {"algorithms": ALGORITHMS, "backbones": BACKBONES, "prompts": PROMPTS, "rewards": REWARDS}
    parts |= {"schedules": SCHEDULES, "steps": STEPS, "windows": WINDOWS}
    print(columns(summaries()) if args.part == "configs" else kinds(parts[args.part]))
    return 0
