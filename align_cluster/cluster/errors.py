"""Turns Ray's errors into the cause and into one line that says why a worker or an object was lost."""

import re

from ray.exceptions import (
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from align_cluster.errors import UserError

LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError, RuntimeEnvSetupError)


class WorkersLost(UserError, RuntimeError):
    """Workers end again and again. The message says which, and why the last one did."""


def cause_of(error: RayTaskError) -> BaseException:
    """Return the exception that the remote code raised, with its own type where Ray kept it."""
    return getattr(error, "cause", None) or error


def reason(error: BaseException) -> str:
    """Return one line that says why a worker or an object was lost; Ray's own text is a page."""
    text = str(error).strip() or type(error).__name__
    if getattr(error, "actor_init_failed", False):
        return text.splitlines()[-1].strip()[:300]  # what its constructor raised
    told = re.search(r"Worker exit detail: *(.+)", text) or re.search(r"The actor (?:is dead|died) because *(.+)", text)
    line = (told[1] if told else text.splitlines()[0]).split(" Some common causes include")[0]
    return line.strip().rstrip(".")[:300]


def start_error(name: str, error: RayError) -> Exception:
    """Return why a worker could not start. Ray hands over only the text of what its constructor raised, so a UserError
    is made again from it."""
    _, found, sentence = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")
    if found:
        return UserError(sentence.strip())
    if isinstance(error, RuntimeEnvSetupError):
        said = re.findall(r"ERROR: (.*)", str(error)) or str(error).strip().splitlines()
        return UserError(f"{name}: its packages cannot be installed ({said[-1].strip()}); correct pool.pip")
    return RuntimeError(f"{name} could not start: {error}")
