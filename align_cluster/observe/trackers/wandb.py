"""Weights & Biases: a run there for each run, online or in files that `wandb sync` uploads later."""

import uuid
from typing import Any, Literal

from align_cluster.observe.trackers.base import TrackedRun, Tracker, TrackerSection, Values, finite

# Seconds. W&B would wait 90 s for a server that does not answer, and at the end of the process without a limit.
LIMITS = {"init_timeout": 30.0, "finish_timeout": 15.0, "login_timeout": 10.0}


class Wandb(Tracker):
    """Writes to Weights & Biases. A resumed run goes on in the same run there."""

    class Config(TrackerSection):
        """Configures Weights & Biases. The login comes from `wandb login` or from the variable WANDB_API_KEY."""

        package = "wandb"
        kind: Literal["wandb"] = "wandb"
        project: str = "align-cluster"
        """The project that holds the runs."""
        entity: str | None = None
        """The user or team that the project belongs to. Null takes the default of the login."""
        name: str | None = None
        """The name that the run is shown under. Null takes that of the run's folder."""
        mode: Literal["online", "offline"] = "online"
        """Where values go: `online` sends them while the run goes on, `offline` writes them to the folder
        trackers/wandb of the run, from where `wandb sync` sends them later."""

    def open(self, run: TrackedRun) -> bool:
        """Begin the run at Weights & Biases, or go on with it. It never asks for a login, since nobody may be there."""
        import wandb

        config, folder, known = self.config, run.folder("wandb"), run.known("wandb")
        name = known or uuid.uuid4().hex[:8]
        folder.mkdir(parents=True, exist_ok=True)
        wandb.setup(wandb.Settings(console="off", silent=True, disable_git=True, save_code=False, **LIMITS))
        if config.mode == "online":
            wandb.login(prompt=False)
        self.run: Any = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or run.path.name,
            id=name,
            resume="allow" if known else None,
            mode=config.mode,
            dir=folder,
            config=run.settings,
            allow_val_change=True,
        )
        run.remember("wandb", name)
        return not known

    def write(self, step: int, values: Values) -> None:
        """Log the finite values. Steps that a resumed run repeats are there already, with the same values."""
        self.run.log(finite(values), step=step)

    def close(self, failed: bool) -> None:
        """Finish the run at Weights & Biases, and end its process, which then has written all."""
        import wandb

        self.run.finish(exit_code=int(failed))
        wandb.teardown()
