"""ADD A TRACKER HERE: write one file with a class like Mlflow, and add one line below."""

from align_cluster.kinds import Kinds
from align_cluster.observe.trackers.mlflow import Mlflow
from align_cluster.observe.trackers.prometheus import Prometheus
from align_cluster.observe.trackers.wandb import Wandb

TRACKERS = Kinds({"prometheus": Prometheus, "wandb": Wandb, "mlflow": Mlflow})
