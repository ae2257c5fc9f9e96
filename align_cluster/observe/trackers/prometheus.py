"""Prometheus: gauges that a Prometheus reads from the Ray that the run works on, while it works."""

from typing import Literal

from align_cluster.files import write_json
from align_cluster.observe.metrics import describe
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.trackers.base import Gauge, TrackedRun, Tracker, TrackerSection, Values, finite

PREFIX = "align_cluster_"  # Ray puts `ray_` before it
RUN = "run"  # the label with the name of the run's folder
# What a step counts from 0. A scrape would miss most steps, so these are added up over the steps of this driver.
COUNTED = (
    "reward/<name>/failed",
    "reward/<name>/failed/<kind>",
    "rollout/non_finite",
    "train/skipped",
    "train/empty",
)


def series(pattern: str) -> tuple[str, tuple[str, ...]]:
    """Return the name that a declared metric has in Prometheus, without Ray's own prefix, and its labels.

    The segments become one word, and each placeholder becomes a label. Where a placeholder ends the pattern, the word
    ends with `_by_` and its name: `reward/<name>/mean` is align_cluster_reward_mean{name=...}, `time/<stage>` is
    align_cluster_time_by_stage{stage=...}. What is added up ends with `_total`.
    """
    parts = pattern.split("/")
    labels = tuple(part.strip("<>") for part in parts if part.startswith("<"))
    word = "_".join(part for part in parts if not part.startswith("<"))
    word += f"_by_{labels[-1]}" if parts[-1].startswith("<") else ""
    return f"{PREFIX}{word}{'_total' * (pattern in COUNTED)}", (RUN, *labels)


class Prometheus(Tracker):
    """Shows the last values to any Prometheus, by Ray's own exporter.

    The rows of live values come every few seconds, and each makes Ray export all that is known again: Ray forgets a
    gauge that nobody sets for 20 s. So the run's values vanish soon after its driver has ended, however that ends.
    """

    class Config(TrackerSection):
        """Shows the run's numbers to a Prometheus. It has no settings: deploy/observe has those of the Prometheus."""

        kind: Literal["prometheus"] = "prometheus"

    live = True

    def open(self, run: TrackedRun) -> bool:
        """Write NAME.prometheus.json beside the run's folder, by which a Prometheus finds the run while it works.

        It is not inside, because Prometheus takes a star in the last part of a path only.
        """
        self.run, self.gauges, self.shown, self.totals = run, dict[str, Gauge](), Values(), Values()
        self.file = RunDir(run.path).prometheus
        write_json(self.file, [{"labels": {"job": "ray"}, "targets": run.addresses()}])
        for name in run.rewards:  # so that the first failure is an increase
            self.totals[f"reward/{name}/failed"] = 0.0
        return False

    def write(self, step: int, values: Values) -> None:
        """Show these values, and forget others of the same kinds: a reward that nothing was scored with has no mean."""
        kinds = {name.partition("/")[0] for name in values}
        self.shown = {name: value for name, value in self.shown.items() if name.partition("/")[0] not in kinds}
        for name, value in finite(values).items():
            if describe(name).pattern in COUNTED:
                self.totals[name] = self.totals.get(name, 0.0) + value
            else:
                self.shown[name] = value
        for name, value in (self.shown | self.totals).items():
            self._show(name, value)

    def _show(self, name: str, value: float) -> None:
        metric = describe(name)
        word, labels = series(metric.pattern)
        if word not in self.gauges:
            unit = f" [{metric.unit}]" if metric.unit else ""
            self.gauges[word] = self.run.gauge(word, metric.meaning + unit, labels)
        parts = zip(metric.pattern.split("/"), name.split("/"), strict=True)
        given = [part for want, part in parts if want.startswith("<")]
        self.gauges[word](value, dict(zip(labels, [self.run.path.name, *given], strict=True)))

    def close(self, failed: bool) -> None:
        """Remove that file."""
        self.file.unlink(missing_ok=True)
