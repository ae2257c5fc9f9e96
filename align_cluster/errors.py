"""Errors that end a command with a sentence instead of a stack trace, and the exit codes that belong to them."""


class UserError(Exception):
    """Something the user can mend: one sentence that says what is wrong, where, and what to do."""


RETRY = 75  # exit code EX_TEMPFAIL of sysexits.h: the same command again will do


class Preempted(Exception):
    """The machine is taken away: what was done is saved, and the same command with --resume auto goes on."""
