"""Talks to a cluster's dashboard about jobs: logs in, follows a job's log until it ends, stops it."""

import asyncio
import logging
import os
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from align_cluster.cluster.checks import token_problem
from align_cluster.errors import INTERRUPTED, RETRY, UserError
from align_cluster.plain import json_value

LOGIN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")  # by which Ray's client logs in, and which hold no secret
AGAIN_S = 1.0  # between two tries to read the log of a job that goes on
SILENCE_S = 120.0  # how long a dashboard may be away before `submit` stops waiting for it; the job goes on


def connect(address: str | None) -> Any:
    """Return a JobSubmissionClient with the authentication that the cluster asks for.

    Raises UserError where no dashboard answers, or one that wants another token. Ray decides whether to send a token by
    RAY_AUTH_MODE, which it reads while it is imported; so the cluster is asked first.
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
        asks = answer.status_code in (401, 403)
        os.environ["RAY_AUTH_MODE"] = "token" if asks else "disabled"
        if asks and (problem := token_problem()):
            raise UserError(f"{url} asks for a token: {problem}")
        if not asks and not _is_dashboard(answer):
            kind = answer.headers.get("Content-Type", "no type").partition(";")[0]
            raise UserError(
                f"{url} answers, but not as a Ray dashboard does (HTTP {answer.status_code}, {kind}); give --address "
                "the URL under which your browser shows the dashboard, with its path behind a proxy"
            )
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
        if isinstance(error, UserError) or "auth" not in f"{type(error).__name__} {error}".lower():
            raise
        raise UserError(
            f"{url} wants another token ({first_line(error)}); put the cluster's into ~/.ray/auth_token, or set "
            "RAY_AUTH_MODE as the cluster has it"
        ) from error


def _is_dashboard(answer: Any) -> bool:
    try:
        return answer.ok and "ray_version" in answer.json()
    except (ValueError, TypeError):
        return False


def _headers() -> dict[str, str] | None:
    """Return the headers that a proxy before the dashboard wants, which `ray job` reads from the same variable."""
    text = os.environ.get("RAY_JOB_HEADERS")
    if not text:
        return None
    try:
        return {str(name): str(value) for name, value in dict(json_value(text)).items()}
    except (ValueError, TypeError):
        raise UserError('RAY_JOB_HEADERS is no JSON object such as {"KEY": "VALUE"}; correct or unset it') from None


def stop_command(client: Any, job: str) -> str:
    """Return a command line that stops the job in any shell: Ray reads from variables how it logs in."""
    program = Path(sys.executable).with_name("ray")
    ray = str(program) if program.exists() else "ray"
    names = (name for name in LOGIN if os.environ.get(name))
    login = [f"{name}={shlex.quote(os.environ[name])}" for name in names]
    return " ".join([*login, shlex.quote(ray), "job stop --address", shlex.quote(client.get_address()), job])


def follow(client: Any, job: str) -> int:
    """Show a job's log until the job ends.

    Returns 0 if it succeeded, 75 if it was told to end and should be submitted again, 1 if it failed. Ctrl-C asks
    whether the job ends too, and returns 130. Raises UserError where the cluster has no such job.
    """
    log = _Log(client, job)
    try:
        info = asyncio.run(log.show())
    except KeyboardInterrupt:
        if not _agreed(f"\njob {job} goes on without this command. Stop it too? [y/N] "):
            print(f"job {job} goes on; see it again with\n  {follow_command(client, job)}", flush=True)
            return INTERRUPTED
        client.stop_job(job)
        print(f"job {job}: stopping after its last finished step", flush=True)
        asyncio.run(log.show())
        return INTERRUPTED
    status = info.status.value
    print(f"job {job}: {status.lower()}", flush=True)
    if status == "FAILED" and info.driver_exit_code is None and info.message:
        print(first_line(info.message))
    if status == "FAILED" and "No module named" in client.get_job_logs(job):
        print("its Python lacks align_cluster or its packages; give --python, the one that has them, or --with-code")
    if info.driver_exit_code == RETRY or status == "STOPPED":
        return RETRY
    return 0 if status == "SUCCEEDED" else 1


def follow_command(client: Any, job: str) -> str:
    """Return the command line that shows the log of a job."""
    return f"align-cluster submit --follow {job} --address {shlex.quote(client.get_address())}"


def _agreed(question: str) -> bool:
    """Ask who sits at the terminal; without one, or where no answer comes, the answer is no."""
    if not sys.stdin.isatty():
        return False
    try:
        return input(question).strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        print()
        return False


class _Log:
    """Shows a job's log, each part once, also where the connection breaks and the log is read from its start again."""

    def __init__(self, client: Any, job: str) -> None:
        self.client, self.job, self.shown = client, job, 0

    async def show(self) -> Any:
        """Show what comes until the job has ended; return Ray's details of the job."""
        from aiohttp import ClientError

        answered = time.monotonic()
        while True:
            try:
                info = self.client.get_job_info(self.job)
                answered = time.monotonic()
                with suppress(RuntimeError, OSError, ClientError):  # a connection that breaks is made again
                    await self._read()
                if info.status.is_terminal():  # before the log was read, so the log was whole
                    return info
            except (RuntimeError, OSError) as error:
                if "status code 404" in str(error):
                    raise UserError(
                        f"{self.client.get_address()} has no job {self.job}; `ray job list` shows those that it has"
                    ) from None
                if time.monotonic() - answered > SILENCE_S:
                    raise UserError(
                        f"{self.client.get_address()} no longer answers ({first_line(error)}); the job may go on: try "
                        f"`{follow_command(self.client, self.job)}` later"
                    ) from error
            await asyncio.sleep(AGAIN_S)

    async def _read(self) -> None:
        read = 0
        async for text in self.client.tail_job_logs(self.job):
            read += len(text)
            if read > self.shown:
                print(text[max(0, len(text) - (read - self.shown)) :], end="", flush=True)
                self.shown = read


def first_line(error: Exception | str) -> str:
    """Return the first line of what Ray says in many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
