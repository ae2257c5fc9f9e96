"""Runs `train` as a Ray job: uploads the run file and what it names, and starts it on the cluster."""

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from align_cluster.cluster import sealing, wheel
from align_cluster.cluster.jobs import connect, first_line, follow, follow_command, stop_command
from align_cluster.cluster.modules import copy_modules
from align_cluster.config.load import dump
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.files import read_text

FILE_SETTINGS = ("path", "exclude")  # the settings of a prompts block that name a file
STOP_WAIT_S = "60"  # seconds for a stopped run to save; Ray would send SIGKILL after 3
MOST_ENVIRONMENT = 100_000  # bytes of a file that describes a runtime environment


def submit(
    config: RunConfig,
    address: str | None = None,
    files: Sequence[Path] = (),
    wait: bool = True,
    python: str = "python",
    resume: str | None = None,
    send: Sequence[str] = (),
    environment: Path | None = None,
    with_code: bool = False,
) -> int:
    """Start the run as a job on the cluster whose dashboard is at `address`. `resume` means what it means for `train`.

    Returns what `follow` returns, or 0 without `wait`.

    The job's working directory holds the resolved config, the prompt files and modules that it names, and `files`:
    align_cluster itself must be installed on the cluster, for `python` there, unless it goes along as a wheel
    (`with_code`). `environment` is a file with a Ray runtime environment. The variables that `send` names go to the job
    sealed (see sealing.py).
    """
    if not PurePosixPath(config.out).is_absolute():
        raise UserError(
            f"out is {config.out}, inside the job's working directory, which Ray deletes; "
            "give --out an absolute path on storage that the cluster keeps, such as /shared/runs"
        )
    values = _values(config, send)
    asked = read_environment(environment, [*sealing.variables(config), sealing.HUB, *send]) if environment else {}
    client = connect(address)
    if values and not sealing.has_token():
        raise UserError(
            f"--env {', '.join(values)}: this cluster asks for no token, with which a value is sealed on its way; "
            "start it with RAY_AUTH_MODE=token, or set the variable on its nodes before `ray start`"
        )
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as beside:
        fill(Path(folder), config, files)
        own = {"RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
        own |= {sealing.SEALED: sealing.seal(values)} if values else {}
        env = {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WAIT_S} | asked.get("env_vars", {}) | own
        entire = asked | {"working_dir": folder, "env_vars": env}
        if with_code:
            modules = [str(wheel.build(Path(beside), needs_model(config)))]
            entire["py_modules"] = [*asked.get("py_modules", []), *modules]
        entrypoint = f"{shlex.quote(python)} -m align_cluster.cli train config.yaml"
        entrypoint += f" --resume {shlex.quote(resume)}" if resume else ""
        try:
            job = client.submit_job(entrypoint=entrypoint, runtime_env=entire)
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            named = f"; look at {environment}" if environment else ""
            raise UserError(f"{client.get_address()} refused the job ({first_line(error)}){named}") from error
    print(f"job {job}: stop it with\n  {stop_command(client, job)}", flush=True)
    if not wait:
        print(f"follow it with\n  {follow_command(client, job)}")
        return 0
    return follow(client, job)


def _values(config: RunConfig, send: Sequence[str]) -> dict[str, str]:
    """Return the variables that go along; a note says which of the run's the cluster itself has to have."""
    for name in send:
        if not os.environ.get(name):
            raise UserError(f"--env {name}: {name} is not set in the environment of this command; export it first")
    for name in sealing.variables(config):
        if name not in send:
            print(f"note: the run reads the cluster's own {name}; --env {name} sends yours", file=sys.stderr)
    return {name: os.environ[name] for name in send}


def read_environment(file: Path, secret: Sequence[str]) -> dict[str, Any]:
    """Read a Ray runtime environment from a YAML or JSON file.

    Raises UserError where it is none, sets one of the variables that are `secret`, or brings a working directory.
    """
    try:
        found = yaml.safe_load(read_text(file, MOST_ENVIRONMENT, "--runtime-env"))
    except FileNotFoundError:
        raise UserError(f"--runtime-env {file} is not there; give a YAML file such as `pip: [einops]`") from None
    except yaml.YAMLError as error:
        raise UserError(f"--runtime-env {file} is no YAML ({first_line(error)}); correct it") from None
    if not isinstance(found, dict):
        raise UserError(f"--runtime-env {file} holds no settings; write some, such as `pip: [einops]`")
    if "working_dir" in found:
        raise UserError(
            f"--runtime-env {file}: working_dir is the folder with the run file, which this command makes; leave it "
            "out, and send files with --file"
        )
    variables = found.setdefault("env_vars", {})
    if not isinstance(variables, dict) or not all(isinstance(text, str) for text in variables.values()):
        raise UserError(f"--runtime-env {file}: env_vars takes a text for each name; put numbers into quotes")
    for name in secret:
        if name in variables:
            raise UserError(
                f"--runtime-env {file}: env_vars.{name} would stand in Ray's logs in clear; leave it out, and give "
                f"--env {name}"
            )
    return found


def needs_model(config: RunConfig) -> bool:
    """Tell whether the run reads the embedded model's weights, which are large beside the code."""
    return any(getattr(block, "path", None) == "embedded" for _, block in config.blocks())


def fill(folder: Path, config: RunConfig, files: Sequence[Path]) -> None:
    """Write the job's working directory: config.yaml, the prompt files (paths rewritten) and modules that it names, and
    `files`."""
    data = config.model_dump(mode="json")
    data["cluster"]["address"] = "auto"
    for block in (data["prompts"], data["evaluate"]["prompts"]):
        if not PurePosixPath(block.get("folder") or "/").is_absolute():
            raise UserError(
                f"prompts.folder is {block['folder']}, and images do not go along with a job: give the absolute path "
                "of a folder that all nodes see"
            )
        for setting in FILE_SETTINGS:
            if block.get(setting):
                block[setting] = _copy(Path(block[setting]).expanduser(), folder).name
    copy_modules(config, folder)
    for file in files:
        _copy(file, folder)
    (folder / "config.yaml").write_text(dump(RunConfig.model_validate(data)), encoding="utf-8")


def _copy(file: Path, folder: Path) -> Path:
    target = folder / file.name
    if not file.is_file():
        raise UserError(f"{file} is no file, so it cannot go along with the job; give an existing one")
    if target.name == "config.yaml" or (target.exists() and target.read_bytes() != file.read_bytes()):
        raise UserError(f"{file} has the name of another file of the job; rename one of them")
    shutil.copyfile(file, target)
    return target
