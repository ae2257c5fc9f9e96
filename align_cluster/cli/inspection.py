"""The commands that look at machines, runs and settings; see commands.py."""

import argparse
import json
from typing import TYPE_CHECKING

from align_cluster.cli.inputs import config_of

if TYPE_CHECKING:
    from align_cluster.settings import Section


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
        checks = examine(args.address, args.quick, config_of(args) if args.config else None)
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
