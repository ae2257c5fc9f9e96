"""Errors that end a command with one sentence, the exit codes of interrupted ones, and what sentences are made of."""

import os
import platform
import re

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and half a character: what is no UTF-8


class UserError(Exception):
    """The user can fix this error: the message says in one sentence what is wrong, where, and what to do."""


RETRY = 75  # exit code EX_TEMPFAIL of sysexits.h: run the same command again
INTERRUPTED = 130  # exit code of shells for what Ctrl-C has ended


class Preempted(Exception):
    """The machine is being taken away. The run has saved its state, and `--resume auto` continues it."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 problem, 2 problems."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def unwritable(text: str) -> bool:
    """Return whether a text holds what no file can hold or be called: NUL, or half of a surrogate pair."""
    return bool(_UNWRITABLE.search(text))


def hub_refusal(error: BaseException) -> str:
    """Return why the hub refused a model, where that is behind an error, and whose HF_TOKEN it asked for; "" where it
    is not."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, RepositoryNotFoundError):  # which a gated one is too
        behind = behind.__cause__ or behind.__context__
    if behind is None:
        return ""
    why = "it is gated; accept its terms there" if isinstance(behind, GatedRepoError) else "it is private, or not there"
    state = "has no access" if os.environ.get("HF_TOKEN") else "is not set"
    return (
        f"the hub refuses it: {why}. HF_TOKEN {state} in the environment of this process on {platform.node()}; a run's "
        "workers get its driver's, and `submit --env HF_TOKEN` sends yours"
    )
