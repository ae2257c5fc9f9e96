"""Runs `train` as a Ray job: uploads the run file and what it names, starts it on the cluster, follows its log."""

import asyncio
import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from align_cluster.cluster import sealing
from align_cluster.config.load import dump
from align_cluster.config.run import RunConfig
from align_cluster.errors import RETRY, UserError
from align_cluster.plain import json_value

LOGIN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")  # by which Ray's client logs in, and which hold no secret
FILE_SETTINGS = ("path", "exclude")  # the settings of a prompts block that name a file


def submit(
    config: RunConfig,
    address: str | None = None,
    files: Sequence[Path] = (),
    wait: bool = True,
    python: str = "python",
    resume: str | None = None,
    send: Sequence[str] = (),
) -> int:
    """Start the run as a job on the cluster whose dashboard is at `address`. `resume` means what it means for `train`.

    Returns 0 if the run succeeded, 75 if it was told to end and should be submitted again, and 1 if it failed.

    The job's working directory holds the resolved config, the prompt files that it names, and `files`, nothing else:
    align_cluster itself must be installed on the cluster, for `python` there. The variables that `send` names go to the
    job sealed (see sealing.py). With `wait` the log is shown as it is written; an interrupt leaves the job running.
    """
    if not PurePosixPath(config.out).is_absolute():
        raise UserError(
            f"out is {config.out}, inside the job's working directory, which Ray deletes; "
            "give --out an absolute path on storage that the cluster keeps, such as /shared/runs"
        )
    values = _values(config, send)
    client = connect(address)
    if values and not sealing.has_token():
        raise UserError(
            f"--env {', '.join(values)}: this cluster asks for no token, with which a value is sealed on its way; "
            "start it with RAY_AUTH_MODE=token, or set the variable on its nodes before `ray start`"
        )
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), config, files)
        env = {"RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
        env |= {sealing.SEALED: sealing.seal(values)} if values else {}
        try:
            entrypoint = f"{shlex.quote(python)} -m align_cluster.cli train config.yaml"
            entrypoint += f" --resume {shlex.quote(resume)}" if resume else ""
            job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": folder, "env_vars": env})
        except RuntimeError as error:
            raise UserError(f"{client.get_address()} refused the job ({_first_line(error)})") from error
    print(f"job {job}: stop it with\n  {_ray_job('stop', client.get_address(), job)}", flush=True)
    if not wait:
        print(f"follow it with\n  {_ray_job('logs -f', client.get_address(), job)}")
        return 0
    asyncio.run(_follow(client, job))
    status = client.get_job_status(job).value
    print(f"job {job}: {status.lower()}", flush=True)
    if status == "FAILED" and "No module named" in client.get_job_logs(job):
        print(f"`{python}` on the cluster lacks align_cluster or its packages; give --python, the one that has them")
    if client.get_job_info(job).driver_exit_code == RETRY:
        return RETRY
    return 0 if status == "SUCCEEDED" else 1


def _values(config: RunConfig, send: Sequence[str]) -> dict[str, str]:
    """Return the variables that go along; a note says which of the run's the cluster itself has to have."""
    for name in send:
        if not os.environ.get(name):
            raise UserError(f"--env {name}: {name} is not set in the environment of this command; export it first")
    for name in sealing.variables(config):
        if name not in send:
            print(f"note: the run reads the cluster's own {name}; --env {name} sends yours", file=sys.stderr)
    return {name: os.environ[name] for name in send}


def _ray_job(command: str, address: str, job: str) -> str:
    """Return a command line about the job that works in a shell as it is: Ray reads from variables how it logs in."""
    program = Path(sys.executable).with_name("ray")
    ray = str(program) if program.exists() else "ray"
    names = (name for name in LOGIN if os.environ.get(name))
    login = [f"{name}={shlex.quote(os.environ[name])}" for name in names]
    return " ".join([*login, shlex.quote(ray), "job", command, "--address", shlex.quote(address), job])


def connect(address: str | None) -> Any:
    """Return a JobSubmissionClient with the authentication that the cluster asks for.

    Raises UserError where nothing answers. Ray decides whether to send a token by RAY_AUTH_MODE, which it reads while
    it is imported; so the cluster is asked first.
    """
    import requests

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise UserError("submit needs the cluster's dashboard; give --address, such as --address http://127.0.0.1:8265")
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address} is no dashboard; jobs go to its http address, such as http://127.0.0.1:8265"
        )
    headers = _headers()
    try:
        answer = requests.get(f"{url}/api/version", headers=headers, timeout=10)
        os.environ["RAY_AUTH_MODE"] = "token" if answer.status_code in (401, 403) else "disabled"
        from ray.job_submission import JobSubmissionClient

        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)  # uploads and closed sockets are no news
        return JobSubmissionClient(url, headers=headers)
    except (requests.exceptions.RequestException, ConnectionError) as error:
        raise UserError(
            f"no Ray dashboard answers at {url} ({type(error).__name__}); check --address, and that Ray was started "
            "with its dashboard"
        ) from error
    except Exception as error:
        if "auth" not in f"{type(error).__name__} {error}".lower():
            raise
        raise UserError(
            f"{url} wants another token ({_first_line(error)}); put the cluster's into ~/.ray/auth_token, or set "
            "RAY_AUTH_MODE as the cluster has it"
        ) from error


def _headers() -> dict[str, str] | None:
    """Return the headers that a proxy before the dashboard wants, which `ray job` reads from the same variable."""
    text = os.environ.get("RAY_JOB_HEADERS")
    if not text:
        return None
    try:
        return {str(name): str(value) for name, value in dict(json_value(text)).items()}
    except (ValueError, TypeError):
        raise UserError('RAY_JOB_HEADERS is no JSON object such as {"KEY": "VALUE"}; correct or unset it') from None


def fill(folder: Path, config: RunConfig, files: Sequence[Path]) -> None:
    """Write the job's working directory: config.yaml, prompt files that it names (paths rewritten), and `files`."""
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


async def _follow(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
