"""MLflow: a run there for each run, at a tracking server or in a local database."""

import logging
import os
import re
import time
from typing import Any, Literal

from align_cluster.observe.trackers.base import TrackedRun, Tracker, TrackerSection, Values, finite

MOST_PARAMS, LONGEST_PARAM = 100, 6000  # what MLflow takes in a call, and characters of one
FOREIGN = r"[^\w. :/-]"  # characters that MLflow allows in no name; tasks of a prompt file may have them


class Mlflow(Tracker):
    """Writes to MLflow. A resumed run goes on in the same run there."""

    class Config(TrackerSection):
        """Configures MLflow."""

        package = "mlflow"
        kind: Literal["mlflow"] = "mlflow"
        uri: str | None = None
        """The tracking server, such as http://127.0.0.1:5000, or a local store, such as sqlite:///mlflow.db. Null takes
        the variable MLFLOW_TRACKING_URI, or the file mlflow.db beside the run's folder where that is not set. The
        variable MLFLOW_TRACKING_PASSWORD holds a password."""
        experiment: str = "align-cluster"
        """The experiment that holds the runs. It is made where it is missing."""
        name: str | None = None
        """The name that the run is shown under. Null takes that of the run's folder."""

    def open(self, run: TrackedRun) -> bool:
        """Begin the run at MLflow with its settings as parameters, or go on with it."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # that it makes tables is no news
        local = f"sqlite:///{run.path.resolve().parent / 'mlflow.db'}"
        self.client: Any = MlflowClient(self.config.uri or os.environ.get("MLFLOW_TRACKING_URI") or local)
        known = run.known("mlflow")
        if known:
            self.client.update_run(known, status="RUNNING")
            self.id = known
            return False
        self.id = self.client.create_run(self._experiment(), run_name=self.config.name or run.path.name).info.run_id
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in run.settings.items()]
        for start in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(self.id, params=params[start : start + MOST_PARAMS])
        run.remember("mlflow", self.id)
        return True

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.config.experiment)
        return found.experiment_id if found else self.client.create_experiment(self.config.experiment)

    def write(self, step: int, values: Values) -> None:
        """Log the finite values in one call."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(
            self.id, [Metric(re.sub(FOREIGN, "_", name), value, now, step) for name, value in finite(values).items()]
        )

    def close(self, failed: bool) -> None:
        """Say how the run ended."""
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")
