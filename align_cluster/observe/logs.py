"""A run's log as lines of JSON, for programs that collect logs. The variable ALIGN_CLUSTER_LOG=json asks for it.

It is no setting of the run file, since it belongs to the place where a run works: a pod, a Slurm job, a terminal.
"""

import json
import logging
import os
import sys
import time

from align_cluster.errors import UserError

VARIABLE = "ALIGN_CLUSTER_LOG"


def as_json() -> bool:
    """Return whether the log is to be lines of JSON. UserError where the variable holds something else."""
    asked = os.environ.get(VARIABLE, "text")
    if asked not in ("text", "json"):
        raise UserError(f"{VARIABLE} is {asked}; set it to json or text, or unset it")
    return asked == "json"


class JsonLog(logging.Handler):
    """Writes each line of the run, and each record of Python's logging, as one object on stdout.

    Its keys are `at` (seconds since 1970), `level`, `run`, `step` (the last one that is done), `worker` (null where the
    line is about none) and `message`.
    """

    def __init__(self, run: str) -> None:
        super().__init__()
        self.run, self.step = run, 0

    def line(self, message: str, level: str = "info", worker: str | None = None) -> None:
        """Write one object."""
        facts = {"at": round(time.time(), 3), "level": level, "run": self.run, "step": self.step, "worker": worker}
        print(json.dumps(facts | {"message": message}, ensure_ascii=False), file=sys.stdout, flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; `extra={"worker": name}` says which worker it is about."""
        self.line(record.getMessage(), record.levelname.lower(), getattr(record, "worker", None))
