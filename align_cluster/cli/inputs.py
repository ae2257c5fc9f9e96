"""What the commands of the command line are given: run files, and the models of runs, with their LoRAs."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from align_cluster.backbones.lora_file import Lora
    from align_cluster.config.load import Settings
    from align_cluster.config.run import RunConfig


class Source(NamedTuple):
    """Says what CONFIG|RUN, --lora and --base name: settings, a LoRA if any, and the folder of the settings.

    `checkpoint` is how users call the folder where it is unfolded from a checkpoint.
    """

    config: "RunConfig"
    lora: "Lora | None"
    folder: Path
    checkpoint: Path | None


def load_file(path: str | Path, overrides: Sequence[str], model: "type[Settings]") -> "Settings":
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


def config_of(args: argparse.Namespace) -> "RunConfig":
    """Load and check the config that CONFIG, --set, --name and --out describe; notes go to stderr."""
    from align_cluster.config.check import check
    from align_cluster.config.run import RunConfig

    overrides = list(args.set)
    for key in ("name", "out"):
        if getattr(args, key, None) is not None:
            overrides.append(f"{key}={json.dumps(getattr(args, key))}")
    config = load_file(args.config, overrides, RunConfig)
    for note in check(config):
        print(f"note: {note}", file=sys.stderr)
    return config


@contextmanager
def source_of(args: argparse.Namespace, overrides: Sequence[str]) -> Iterator[Source]:
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
        yield Source(load_file(file, overrides, RunConfig), weights, file.parent, target.checkpoint)
