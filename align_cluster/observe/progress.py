"""Progress shows a run in the terminal while it works; `table` shows its end."""

import logging
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from align_cluster.observe.logs import JsonLog, as_json
from align_cluster.observe.rundata import load
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.table import comparison_table, headline_column, short

SHOWN_REWARDS = 3  # rewards that fit into one line of a terminal
WIDE = 100  # columns of a terminal from which on bars are long


class Progress:
    """Shows what a run does: sentences until its first stage, then a bar for the run and one for each stage of a step.

    Where stdout is no terminal, plain lines take the place of bars, or lines of JSON where `observe.logs` is asked for
    them.
    """

    def __init__(
        self,
        total_steps: int,
        stages: Mapping[str, str],
        every: int | None = None,
        console: Console | None = None,
        began: float | None = None,
        run: str = "",
    ) -> None:
        """Prepare a display of `total_steps` steps with the given stages, each with the unit that it counts in.

        Without a terminal, one line appears every `every` steps; None gives about twenty lines a run. `began` is when
        the command began, by the monotonic clock; None: now. `run` is the run's name in lines of JSON.
        """
        self.total, self.units, self.console = total_steps, stages, console or Console()
        self.every = every or max(1, total_steps // 20)
        self.began = self.last = time.monotonic() if began is None else began
        self.recent: deque[float] = deque(maxlen=10)
        self.first_rewards: dict[str, float] = {}
        self.live = None
        self.log = JsonLog(run) if as_json() else None
        if self.console.is_terminal and not self.log:
            width, length = max(map(len, ["steps", *stages])), 36 if self.console.width >= WIDE else 16
            self.run = Bars(_name(width), BarColumn(length), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self.run_bar = self.run.add_task("steps", total=total_steps, text="")
            self.stages = Bars(_name(width), _Bar(length), _Count(), TimeElapsedColumn())
            self.bars = {n: self.stages.add_task(n, start=False, total=1, unit=u) for n, u in stages.items()}
            self.rewards = Text()
            self.live = Live(Group(self.run, self.rewards, self.stages), console=self.console, refresh_per_second=8)

    def __enter__(self) -> "Progress":
        """Begin; the bars appear with the first stage."""
        self.last = time.monotonic()
        if self.log:
            logging.getLogger().addHandler(self.log)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bars as they are on the screen."""
        if self.live:
            self.live.stop()
        if self.log:
            logging.getLogger().removeHandler(self.log)

    def phase(self, text: str) -> None:
        """Say what begins now, with the time since the command began."""
        self._plain(f"{clock(time.monotonic() - self.began):>7}  {text}")

    def resume(self, step: int, first: dict[str, float]) -> None:
        """Go on after `step` steps, and compare rewards with those in `first`, the metrics of the run's first step."""
        self._rewards(first)
        self._done(step)
        if self.live:
            self.run.update(self.run_bar, completed=step)

    def stage(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of stage `name` are ready; 0 begins the stage anew.

        A total of 1 is work that cannot be counted, whose bar moves without an end. A call is cheap enough for every
        chunk. ValueError for a stage that was not declared.
        """
        if name not in self.units:
            raise ValueError(f"stage {name!r} was not declared; there are {', '.join(self.units)}")
        if self.live:
            bar = self.bars[name]
            if done == 0:
                self.live.start()
                self.stages.reset(bar, total=total)
            self.stages.start_task(bar)
            self.stages.update(bar, completed=done, total=None if total == 1 and not done else total)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Show that `step` steps (1 ... total) are done; `values` are the metrics of the last one."""
        now = time.monotonic()
        self._done(step)
        # The time before the first step holds the start of the workers and an evaluation, which do not come again.
        self.recent.append(now - self.last if self.recent else values.get("time/step", now - self.last))
        self.last = now
        eta, rewards = f"ETA {clock(self._remaining(step))}", self._rewards(values)
        text = "  ".join([eta, *rewards])
        if self.live:
            self.run.update(self.run_bar, completed=step, text=eta)
            self.rewards.plain = "  ".join(rewards)
        elif step == 1 or step % self.every == 0 or step == self.total:
            speed = values.get("throughput/images_per_s")
            rate = "" if speed is None else f"  {speed:.1f} images/s"
            self._plain(f"step {step}/{self.total}  elapsed {clock(now - self.began)}  {text}{rate}")

    def note(self, text: str) -> None:
        """Print one line that stays, above the bars."""
        self._plain(text)

    def _remaining(self, step: int) -> float:
        """Return the seconds that the steps after `step` take at the pace of the last ten."""
        return sum(self.recent) / len(self.recent) * (self.total - step)

    def _rewards(self, values: dict[str, float]) -> list[str]:
        """Return a phrase for each mean reward, with the value that it began with."""
        texts = []
        for metric, value in values.items():
            kind, _, rest = metric.partition("/")
            if kind == "reward" and rest.endswith("/mean"):
                name = rest.removesuffix("/mean")
                first = self.first_rewards.setdefault(name, value)
                texts.append(f"{name} {value:.3f} (began {first:.3f})")
        return texts[:SHOWN_REWARDS]

    def named(self, run: str) -> None:
        """Take the name of the run's folder as the run's in lines of JSON."""
        if self.log:
            self.log.run = run

    def finish(self, summary: dict[str, Any], run_dir: Path) -> None:
        """Show the end of the run: a table, or where it lies."""
        if self.log:
            self.log.line(f"done: {run_dir}")
        else:
            self.console.print(table(summary, run_dir))

    def _done(self, step: int) -> None:
        if self.log:
            self.log.step = step

    def _plain(self, text: str) -> None:
        if self.log:
            self.log.line(text.strip())
        else:
            self.console.print(escape(text), soft_wrap=True, highlight=False)


class _Bar(BarColumn):
    """A bar that moves where work goes on that cannot be counted. rich also moves those of work that has not begun."""

    def render(self, task: Task) -> ProgressBar:
        """Return the bar of one stage."""
        bar = super().render(task)
        bar.pulse = False  # one without a total moves anyway
        return bar


class _Count(MofNCompleteColumn):
    """Tells how many units of a stage are ready, where it has begun and has units."""

    def render(self, task: Task) -> Text:
        """Return the count of one stage with its unit, or nothing."""
        unit = task.fields["unit"]
        return super().render(task).append(f" {unit}", style="default") if task.started and unit else Text()


def _name(width: int) -> TextColumn:
    return TextColumn("{task.description:<" + str(width) + "}")


def clock(seconds: float) -> str:
    """Format seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def table(summary: dict[str, Any], run_dir: Path | None = None) -> Table:
    """Return the end of a run as a table: held-out score before and after, images, time, and where the files are.

    `summary` is the content of summary.json; the table leaves out what it lacks.
    """
    outer = Table.grid(padding=(0, 0, 1, 0))
    before, after = summary.get("before") or {}, summary.get("after") or {}
    if run_dir and RunDir(run_dir).holds_a_run():  # its evaluations also say what is within the noise
        run = load(RunDir(run_dir))
        before, after = run.before, run.after
    column = headline_column(summary.get("headline"), list(before.get("overall", {})))
    if column:
        title = f"held-out {short(column)}"
        outer.add_row(comparison_table(before, after, column, title))
    facts = Table.grid(padding=(0, 2))
    facts.add_column()
    facts.add_column(overflow="fold")  # paths are whole
    for name, text in _facts(summary, run_dir):
        facts.add_row(f"[dim]{name}[/]", escape(text))
    outer.add_row(facts)
    return outer


def _facts(summary: dict[str, Any], run_dir: Path | None) -> list[tuple[str, str]]:
    facts = []
    if "images_drawn" in summary:
        facts.append(("images", f"{summary['images_drawn']} drawn, {summary['images_per_s']:.1f} images/s"))
    if "wall_seconds" in summary:
        parts = "  ".join(f"{stage} {clock(seconds)}" for stage, seconds in summary["stage_seconds"].items())
        facts.append(("wall time", f"{clock(summary['wall_seconds'])}   {parts}"))
    if summary.get("lora_path"):
        facts.append(("LoRA", f"{summary['lora_path']}"))
    if run_dir:
        facts.append(("files", f"{run_dir}"))
        facts.append(("report", f"{run_dir / 'report.html'}"))
    return facts
