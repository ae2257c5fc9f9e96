"""The commands that talk to a cluster or to a reward service; see commands.py."""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from align_cluster.cli.inputs import config_of, load_file

if TYPE_CHECKING:
    from align_cluster.serving.config import ServiceConfig


def submit(args: argparse.Namespace) -> int:
    """Run `train` as a job on a Ray cluster, and follow its log unless --no-wait is given; or follow an earlier job."""
    if args.follow:
        from align_cluster.cluster.jobs import connect, follow

        return follow(connect(args.address), args.follow)
    from align_cluster.cluster.submit import submit

    return submit(
        config_of(args),
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

    config = load_file(args.config, args.set, ServiceConfig)
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
