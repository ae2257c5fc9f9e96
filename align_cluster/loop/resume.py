"""Decides which directory a run works in, and what it goes on from."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from align_cluster.checkpoint.store import Damaged, Store, step_of
from align_cluster.cluster.nodes import software
from align_cluster.config.load import as_before, differences
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.files import read_json, user_path, write_text
from align_cluster.loop.state import State, store_of
from align_cluster.observe.rundir import RunDir
from align_cluster.streams import VERSION

Note = Callable[[str], None]


@dataclass(frozen=True)
class StartingPoint:
    """Holds a locked run directory, the store of its checkpoints, hashes of what the run reads (see `inputs.py`), and
    the state to go on from (None for a new run)."""

    run: RunDir
    store: Store
    inputs: dict[str, str]
    state: State | None = None

    @property
    def steps(self) -> int:
        """Return the number of steps that are done."""
        return self.state.step if self.state else 0

    def settled(self, config: RunConfig) -> RunConfig:
        """Return the config with what the run had filled in when it began."""
        return as_before(self.state.facts["config"], config) if self.state else config

    def finished(self, config: RunConfig) -> bool:
        """Tell whether nothing is left to do: the run has its summary and all the steps that are asked for."""
        return self.steps >= config.steps and (read_json(self.run.summary) or {}).get("steps", 0) >= config.steps


@contextmanager
def starting_point(
    config: RunConfig, out: Path, resume: str | None, note: Note, inputs: dict[str, str]
) -> Iterator[StartingPoint]:
    """Yield the run's directory, locked.

    `resume` is None for a new run, "auto" for the newest run of that name that has a checkpoint (or a new one), a run
    directory, or the folder of one checkpoint, from which a new directory branches off. Raises UserError where another
    process works there, or the checkpoint belongs to a run of other settings or `inputs`.
    """
    if config.checkpoint.path:
        Store(config.checkpoint.path).probe()
    run = _newest(config, out) if resume == "auto" else None
    branch = None
    if resume == "auto":
        note(f"{run.path} goes on" if run else f"no checkpoint of {config.name} under {out}: a new run begins")
    elif resume:
        given = user_path(resume)
        branch = step_of(given.name)
        if branch is None and not RunDir(given).config.is_file():
            raise UserError(
                f"--resume {resume} is neither a run directory, such as runs/quickstart, nor a checkpoint in one, such "
                "as runs/quickstart/checkpoints/step_000010; or write --resume auto"
            )
        run = RunDir(given) if branch is None else None
    if run:
        run.path.mkdir(parents=True, exist_ok=True)
        with run.lock():
            store = store_of(config, run)
            state = store.newest(note, make=State.of)
            if state is None:
                raise UserError(f"{store.path} holds no checkpoint that can be read; start again without --resume")
            state = _fitting(config, state, note, inputs)
            store.clean()
            _write_back(run, state)
            yield StartingPoint(run, store, inputs, state)
        return
    state = None if branch is None else _branch(config, resume, branch, note, inputs)
    run = RunDir.create(out, config.name)
    with run.lock():
        try:
            store = store_of(config, run)
            if store.steps():
                raise UserError(
                    f"checkpoint.path: {store.path} holds checkpoints of another run; go on with it by --resume auto, "
                    "or give another name or checkpoint.path"
                )
            if state:
                _write_back(run, state)
            yield StartingPoint(run, store, inputs, state)
        except BaseException:
            run.discard_unused()
            raise


def _newest(config: RunConfig, out: Path) -> RunDir | None:
    """Return the last of name, name-2, name-3 ... that has a checkpoint."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if config.checkpoint.path:
        names |= Store(config.checkpoint.path).folders()
    numbers = [match for name in names if (match := re.fullmatch(rf"{re.escape(config.name)}(?:-(\d+))?", name))]
    for match in sorted(numbers, key=lambda match: int(match[1] or 1), reverse=True):
        run = RunDir(out / match[0])
        if store_of(config, run).steps():
            return run
    return None


def _branch(config: RunConfig, folder: str, step: int, note: Note, inputs: dict[str, str]) -> State:
    store = Store(str(user_path(folder).parent))
    try:
        state = State.of(step, store.read(step)[0])
    except Damaged as error:
        raise UserError(f"--resume {folder} cannot be used: {error}; give another checkpoint") from None
    return _fitting(config, state, note, inputs)


def _fitting(config: RunConfig, state: State, note: Note, inputs: dict[str, str]) -> State:
    if state.facts.get("streams") != VERSION:
        raise UserError(
            "--resume: the run was begun by another version of align_cluster, whose seeds draw other noise; go on with "
            "that version, or start a new run without --resume"
        )
    odd = differences(state.facts["config"], config)
    if odd:
        raise UserError(
            "--resume: the run began with other settings, and would be another run with these: "
            f"{'; '.join(odd)}. Set them back, or start a new run without --resume"
        )
    if state.step > config.steps:
        raise UserError(f"--resume: {state.step} steps are done, and steps is {config.steps}; set steps to more")
    known = state.facts["inputs"]
    if other := [name for name, digest in inputs.items() if known.get(name, digest) != digest]:
        changed = f"what these settings name has changed since the run began: {', '.join(other)}"
        if not config.checkpoint.inputs_may_change:
            raise UserError(f"--resume: {changed}; put it back, or set checkpoint.inputs_may_change to true")
        note(f"resumed although {changed}")
    there, here = state.facts["versions"], software()
    changed = [f"{name} {there.get(name)} -> {here.get(name)}" for name in here if there.get(name) != here[name]]
    if changed:
        note(f"resumed with other versions, so results may differ in their last bits: {', '.join(changed)}")
    return state


def _write_back(run: RunDir, state: State) -> None:
    """Write the line files as they were; the rows of later steps are made again."""
    for name, content in state.texts().items():
        write_text(run.path / name, content.decode())
