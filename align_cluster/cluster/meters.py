"""Gauges that Ray's exporter on this node shows to Prometheus, also where a private Ray has no dashboard."""

from collections.abc import Callable

from ray.util import metrics

from align_cluster.cluster.placement import nodes
from align_cluster.errors import UserError


def gauge(name: str, meaning: str, labels: tuple[str, ...]) -> Callable[[float, dict[str, str]], None]:
    """Make a gauge and return what sets it. Ray exports it within ten seconds as `ray_NAME`, and for about 20 s."""
    made = metrics.Gauge(name, description=meaning, tag_keys=labels)
    return lambda value, tags: made.set(value, tags=tags)


def addresses() -> list[str]:
    """Return host:port of the exporter of each node. UserError where this Ray exports no metrics."""
    exporting = [node for node in nodes() if node["MetricsExportPort"] > 0]
    if not exporting:
        raise UserError("this Ray exports no metrics: unset RAY_enable_metrics_collection where it is started")
    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in exporting]
