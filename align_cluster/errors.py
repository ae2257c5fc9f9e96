"""Errors that end a command with one sentence instead of a stack trace, and the exit codes of interrupted ones."""


class UserError(Exception):
    """The user can fix this error: the message says in one sentence what is wrong, where, and what to do."""


RETRY = 75  # exit code EX_TEMPFAIL of sysexits.h: run the same command again
INTERRUPTED = 130  # exit code of shells for what Ctrl-C has ended


class Preempted(Exception):
    """The machine is being taken away. The run has saved its state, and `--resume auto` continues it."""
