"""The parser of the command line: what each command takes. Importing it imports nothing heavy."""

import argparse
import difflib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from align_cluster import __version__
from align_cluster.cli import cluster_commands, commands, inspection
from align_cluster.errors import UserError

DESCRIPTION = "Align text-to-image models with rewards, on a laptop or on a Ray cluster."
EPILOG = """\
start here:
  align-cluster train quickstart                     minutes on two cores, no GPU
  align-cluster sample runs/quickstart --prompt "a photo of a red circle"

Every command explains itself: align-cluster train --help. Mistakes in a run file are reported in one line each."""

PARTS = ["algorithms", "backbones", "configs", "prompts", "rewards", "schedules", "steps", "windows"]

RESUME = (
    "go on with the newest run of this name that has a checkpoint, or begin one (auto); or with a run directory; or "
    "branch off from a checkpoint's folder"
)

CHECKPOINT = "a checkpoint: RUN/checkpoints/step_000040, RUN@40, or RUN@best by held-out score"


class _Parser(argparse.ArgumentParser):
    """Ends with one sentence, as every mistake of the user does, where argparse prints how the command is used."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's message, and the nearest choice where one is misspelt."""
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong and (near := difflib.get_close_matches(wrong[1], re.findall(r"[\w-]+", wrong[2]), 1)):
            message += f"; did you mean {near[0]}?"
        raise UserError(f"{' '.join(message.split())}; `{self.prog} --help` explains it")


def _path(text: str) -> Path:
    """Read an argument that is a path, with ~ expanded."""
    from align_cluster.files import user_path

    return user_path(text)


def _whole(least: int) -> Callable[[str], int]:
    """Make the reader of an argument that is a whole number of at least `least`, and of at most 63 bits."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number < 2**63:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number of at least {least}")
        return number

    return read


def _number(least: float) -> Callable[[str], float]:
    """Make the reader of an argument that is a finite number of at least `least`."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number < math.inf:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number of at least {least:g}")
        return number

    return read


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; each sets `command` to its function in `commands`."""
    parser = _Parser(
        "align-cluster", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"align-cluster {__version__}")
    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, function: Callable[[argparse.Namespace], int], summary: str, example: str, *shared: str
    ) -> argparse.ArgumentParser:
        """Add a command with its example and those arguments of SHARED that it takes."""
        command = group.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  align-cluster {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=function)
        for argument in shared:
            flags, settings = SHARED[argument]
            command.add_argument(*flags, **settings)
        return command

    for add_commands in (_add_planning, _add_results, _add_cluster, _add_inspection):
        add_commands(add)
    return parser


def _add_planning(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that take a run file."""
    init = add(
        "init",
        commands.init,
        "copy a run file that ships with align-cluster, to start from",
        "init quickstart --out mine.yaml",
    )
    init.add_argument(
        "name", nargs="?", default="quickstart", metavar="NAME", help="such as quickstart, which is the default"
    )
    init.add_argument("--out", type=_path, metavar="FILE", help="file to write (default: NAME.yaml)")
    init.add_argument("--force", action="store_true", help="write over FILE, and over the schema beside it")
    train = add(
        "train",
        commands.train,
        "run an alignment job",
        "train configs/quickstart.yaml --set steps=20 --name short",
        *("config", "set", "name", "out"),
    )
    train.add_argument("--resume", metavar="auto|PATH", help=RESUME)
    validate = add(
        "validate",
        commands.validate,
        "check a run file in seconds",
        "validate configs/quickstart.yaml",
        "config",
        "set",
    )
    validate.add_argument("--resolved", action="store_true", help="print every setting, defaults included, as YAML")
    plan = add(
        "plan",
        commands.plan,
        "show pools, batches, memory, FLOPs, and whether a run fits",
        "plan configs/sd35_medium_nft.yaml --gpus 8 --gpu-memory 80",
        "config",
        "set",
        "json",
    )
    plan.add_argument(
        "--cores", type=_whole(1), help="plan for a cluster with so many CPU cores (default: this machine)"
    )
    plan.add_argument("--gpus", type=_whole(0), help="plan for a cluster with so many GPUs (default: this machine)")
    plan.add_argument(
        "--gpu-memory", type=_number(0.1), metavar="GIB", help="memory of each GPU in GiB (default: this machine's)"
    )


def _add_results(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that take what a run left."""
    sample = add(
        "sample",
        commands.sample,
        "draw images into a folder, with a LoRA or without",
        'sample --run runs/quickstart --prompt "a photo of a red circle" --count 8 --compare base',
        *("set", "lora", "base", "seed"),
    )
    sample.add_argument(
        "target", nargs="?", metavar="CONFIG|RUN", help=f"run file, or the folder of a run, or {CHECKPOINT}"
    )
    sample.add_argument(
        *("--run", "--config"),
        dest="source",
        metavar="CONFIG|RUN",
        help="the same, named (default: the run that --lora is of)",
    )
    sample.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    sample.add_argument(
        "--prompts", metavar="FILE", help="prompts from a file, one a line (.txt) or JSON lines (.jsonl)"
    )
    sample.add_argument("--steps", type=_whole(1), help="denoising steps (default: the run's evaluation steps)")
    sample.add_argument(
        "--guidance", type=_number(1), help="guidance scale, 1 is none (default: the run's evaluation guidance)"
    )
    sample.add_argument("--count", type=_whole(1), default=4, help="images a prompt (default 4)")
    sample.add_argument(
        "--compare", choices=["base"], help="draw the base model too, from the same noise, side by side"
    )
    sample.add_argument(
        "--steer",
        metavar="MODE",
        help="steer by the run's critic: best_of_n, smc, guidance or guided_best_of_n; settings by --set steer.n=4",
    )
    sample.add_argument("--no-score", action="store_true", help="leave the run's rewards out")
    sample.add_argument(
        "--out", type=_path, metavar="DIR", help="folder to make (default: samples, then samples-2 ...)"
    )
    evaluate = add(
        "evaluate",
        commands.evaluate,
        "score held-out prompts, with a LoRA or without",
        "evaluate runs/quickstart --out scores.json",
        *("target", "set", "lora", "base", "json"),
    )
    evaluate.add_argument("--out", type=_path, metavar="FILE", help="also write the scores to this JSON file")
    export = add(
        "export",
        commands.export,
        "write a run's result for other tools, with a model card",
        "export runs/quickstart --to lora --out quickstart-lora",
        "set",
    )
    export.add_argument("run", metavar="RUN", help=f"folder of a run that has finished, or {CHECKPOINT}")
    export.add_argument(
        "--to",
        required=True,
        metavar="FORM",
        help="lora (for diffusers and ComfyUI), peft, merged (the denoiser) or diffusers (the whole pipeline)",
    )
    export.add_argument("--out", required=True, type=_path, metavar="DIR", help="folder to make")
    export.add_argument("--base-model", metavar="ID", help="the base model's id on the hub, if RUN has a local copy")
    export.add_argument("--license", metavar="ID", help="id of the base model's licence, such as apache-2.0")
    export.add_argument("--precision", help="of merged weights: fp32 (default), bf16 or fp16")


def _add_cluster(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that talk to a cluster or a service."""
    submit = add(
        "submit",
        cluster_commands.submit,
        "run `train` as a job on a Ray cluster",
        "submit configs/quickstart.yaml --address http://127.0.0.1:8265 --out /shared/runs",
        *("set", "name"),
    )
    what = submit.add_mutually_exclusive_group(required=True)
    what.add_argument("config", nargs="?", metavar="CONFIG", help="run file, or the name of a shipped one")
    what.add_argument("--follow", metavar="JOB", help="show the log of a job that was submitted before, to its end")
    submit.add_argument("--address", metavar="URL", help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS)")
    submit.add_argument(
        "--out", help="folder for runs on the cluster, an absolute path on storage that outlives the job"
    )
    submit.add_argument("--resume", metavar="auto|PATH", help=RESUME)
    submit.add_argument(
        "--file", action="append", default=[], type=_path, help="another file that the job needs; repeatable"
    )
    submit.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="send a variable such as a token or HF_TOKEN to the job, sealed with the cluster's token; repeatable",
    )
    submit.add_argument(
        "--runtime-env", type=_path, metavar="FILE", help="Ray runtime environment of the job (YAML): pip, env_vars ..."
    )
    submit.add_argument(
        "--with-code", action="store_true", help="send align_cluster along, to a cluster that has what it depends on"
    )
    submit.add_argument("--python", default="python", help="Python on the cluster to run it with (default: python)")
    submit.add_argument(
        "--no-wait", action="store_true", help="return once the job is queued, instead of following its log"
    )
    scale = add(
        "scale",
        commands.scale,
        "run a job for a few steps on 1, 2, 4 ... nodes, and show what each of them brings",
        "scale configs/sd35_medium_nft.yaml --nodes 1 2 4 8 --address auto",
        *("config", "set", "json"),
    )
    scale.add_argument("--nodes", type=_whole(1), nargs="+", required=True, metavar="N", help="numbers of nodes")
    how = scale.add_mutually_exclusive_group()
    how.add_argument("--weak", dest="strong", action="store_false", help="a step grows with the nodes (default)")
    how.add_argument("--strong", action="store_true", help="a step stays as it is")
    scale.set_defaults(strong=False)
    scale.add_argument("--steps", type=_whole(1), default=4, help="steps that are measured each time (default 4)")
    scale.add_argument("--address", help="Ray cluster (default: the run file's, or nodes on this machine)")
    scale.add_argument(
        "--out",
        type=_path,
        dest="folder",
        metavar="DIR",
        help="folder of the figures, to which another call adds (default: NAME-scale)",
    )
    add(
        "serve-rewards",
        cluster_commands.serve_rewards,
        "serve rewards over HTTP, apart from the jobs that use them",
        "serve-rewards configs/rewards_service.yaml --set port=9000",
        *("service", "set"),
    )
    score = add(
        "score",
        cluster_commands.score,
        "score images with a reward of a service",
        'score --url http://127.0.0.1:8000 --reward clip --prompt "a photo of a red circle" image.png',
        "json",
    )
    score.add_argument("images", nargs="+", type=_path, metavar="IMAGE", help="image files; read as RGB")
    score.add_argument("--url", required=True, help="the service, as `serve-rewards` prints it")
    score.add_argument("--reward", required=True, metavar="NAME", help="name of a reward at the service")
    score.add_argument("--prompt", required=True, metavar="TEXT", help="the prompt of all images")
    score.add_argument("--metadata", metavar="JSON", default="{}", help="what the reward reads beside the prompt")
    score.add_argument("--token-env", metavar="NAME", help="environment variable with the service's token")
    score.add_argument("--token-file", metavar="FILE", help="file with the service's token")
    score.add_argument(
        "--timeout", type=_number(0.1), default=60.0, metavar="S", help="seconds for a request (default 60)"
    )


def _add_inspection(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that look at machines, runs and settings."""
    doctor = add(
        "doctor",
        inspection.doctor,
        "check this machine, a cluster before a run, or a run while it works",
        "doctor --address auto --config configs/sd35_medium_nft.yaml\n  align-cluster doctor runs/quickstart",
        "json",
        "set",
    )
    doctor.add_argument("run", nargs="?", type=_path, metavar="RUN", help="folder of a run: say what it is doing")
    doctor.add_argument("--address", help="also check this Ray cluster: auto, an address, or a dashboard's URL")
    doctor.add_argument(
        "--config", metavar="CONFIG", help="also try whether this run would get its share of the cluster"
    )
    doctor.add_argument("--quick", action="store_true", help="skip the weight-sync round trip")
    report = add(
        "report",
        inspection.report,
        "write a run's report.html again, or a page about two runs side by side",
        "report runs/quickstart\n  align-cluster report runs/quickstart runs/quickstart-2",
    )
    report.add_argument("run", type=_path, metavar="RUN", help="run folder")
    report.add_argument("other", type=_path, nargs="?", metavar="RUN2", help="folder of a run to set beside it")
    report.add_argument("--out", type=_path, metavar="FILE", help="page to write (of two runs: RUN/report-RUN2.html)")
    schema = add(
        "schema", inspection.schema, "print the JSON schema of run files, for editors", "schema > run.schema.json"
    )
    explain = add(
        "explain",
        inspection.explain,
        "say what the settings of a block mean, with types, defaults and bounds",
        "explain rewards.hps",
    )
    block = "such as algorithm.nft, or steer.smc for --steer smc (default: all)"
    explain.add_argument("topic", nargs="?", default="", metavar="BLOCK", help=block)
    for command in (schema, explain):
        command.add_argument("--service", action="store_true", help="of service files instead of run files")
    kinds = add("list", inspection.list_kinds, "name the kinds of one part, with a line about each", "list rewards")
    kinds.add_argument("part", choices=PARTS)
    completion = add(
        "completion",
        _complete,
        "print what makes a shell complete commands and options with the tab key",
        "completion bash > ~/.local/share/bash-completion/completions/align-cluster",
    )
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def _complete(args: argparse.Namespace) -> int:
    """Print a shell's completion script; what is a file or a folder completes as such."""
    import shtab

    parser = build_parser()
    for command in parser._subparsers._group_actions[0].choices.values():
        for action in command._actions:
            if re.search("CONFIG|RUN|FILE|DIR|IMAGE", action.metavar or ""):
                action.complete = shtab.FILE
    print(shtab.complete(parser, args.shell))
    return 0


# Arguments that several commands share, by name: (flags, settings of `add_argument`).
SHARED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "config": (("config",), {"metavar": "CONFIG", "help": "run file, or the name of a shipped one"}),
    "service": (("config",), {"metavar": "CONFIG", "help": "service file, or rewards_service"}),
    "target": (
        ("target",),
        {"metavar": "CONFIG|RUN", "help": f"run file, or the folder of a run (brings its LoRA), or {CHECKPOINT}"},
    ),
    "set": (
        ("--set",),
        {
            "action": "extend",
            "nargs": "+",
            "default": [],
            "metavar": "PATH=VALUE",
            "help": "override settings by dotted path, such as optimizer.lr=1e-4; several, after one --set or more, "
            "apply in their order; a new kind starts its block anew; rewards.geneval=null removes that reward",
        },
    ),
    "name": (("--name",), {"help": "name of the run (default: the run file's)"}),
    "out": (("--out",), {"help": "folder that holds runs (default: the run file's)"}),
    "lora": (("--lora",), {"metavar": "FILE|RUN", "help": f"LoRA file, or a run, or {CHECKPOINT}, whose LoRA to use"}),
    "base": (("--base",), {"action": "store_true", "help": "the base model, although RUN has a LoRA"}),
    "seed": (("--seed",), {"type": _whole(0), "default": 0, "help": "seed of the images (default 0)"}),
    "json": (("--json",), {"action": "store_true", "help": "print JSON instead of a table"}),
}
