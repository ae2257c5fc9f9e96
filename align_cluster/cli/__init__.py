"""The command line: its exit codes, and one sentence for every mistake of the user.

Nothing heavy is imported before a command runs, so `align-cluster --help` answers at once.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from align_cluster.cli.parser import build_parser
from align_cluster.errors import INTERRUPTED, RETRY, Preempted, UserError, unwritable
from align_cluster.interrupts import SAID

# These silence libraries that print much which users need not read; Ray's workers inherit them.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}

# Commands that import for seconds before they have anything to say; `train` and `serve-rewards` say what they read.
QUIET_START = ("validate", "plan", "scale", "sample", "evaluate", "export", "report", "doctor", "score")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The code is 0 for success, 1 for a check or a score that failed, 2 for a mistake that the user can mend, 75 where
    SIGTERM ended a run that should be started again, and 130 after an interrupt. Other errors rise.
    """
    try:
        argv = _readable(sys.argv[1:] if argv is None else argv)
        args = build_parser().parse_args(argv)
        with suppress(FileNotFoundError):  # a folder that is gone
            sys.path.append(os.getcwd())  # last: a user's own parts may be here, and nothing here hides a package
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        if args.command.__name__ in QUIET_START and sys.stderr.isatty():
            print("loading libraries", file=sys.stderr, flush=True)
        return args.command(args)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second one would end the ending in a traceback
        print(SAID[signal.SIGINT], file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        from align_cluster.settings import masked

        if isinstance(error, Preempted):
            print(SAID[signal.SIGTERM], file=sys.stderr)
            return RETRY
        if not isinstance(error, UserError):
            raise
        for line in masked(str(error)).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2


def _readable(argv: Sequence[str]) -> Sequence[str]:
    """Return the arguments. Raises UserError where one holds what no file, JSON or terminal can: NUL, or no UTF-8."""
    for argument in argv:
        if unwritable(argument):
            raise UserError(f"{argument[:60]!r} holds NUL, or bytes that are no UTF-8; write it otherwise")
    return argv
