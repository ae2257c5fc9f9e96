"""A checkpoint as a model: RUN/checkpoints/step_000040, RUN@40 and RUN@best stand wherever a run's folder does.

A checkpoint is unfolded into the folder that a run would have left which had ended there, so that whoever reads a run
reads a checkpoint as well.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from align_cluster.backbones import BACKBONES
from align_cluster.checkpoint.store import Damaged, Store
from align_cluster.config.load import config_hash, dump, load, loads
from align_cluster.errors import UserError
from align_cluster.files import user_path, write_json, write_text
from align_cluster.loop.state import State, reading, store_of, write_critic
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import read_jsonl
from align_cluster.observe.table import headline_score

NOTHING = {"overall": {}, "tasks": {}}  # held-out scores of weights that nobody has evaluated


class Opened(NamedTuple):
    """Says where the files of a run or a LoRA are. `checkpoint` is how users call it where it is unfolded from one."""

    path: Path
    checkpoint: Path | None = None


class Place(NamedTuple):
    """Names one checkpoint: its store and its step, the directory of its run, and how users call it."""

    store: Store
    step: int
    run: RunDir
    name: str


@contextmanager
def opened(given: str | Path) -> Iterator[Opened]:
    """Yield what `given` names: a path as it is, or a checkpoint as a run's folder, which goes when the context ends.

    Raises UserError where there is no such checkpoint, or where it is damaged.
    """
    place = find(str(given))
    if place is None:
        yield Opened(user_path(given))
        return
    with TemporaryDirectory(prefix="align-cluster-") as folder:
        try:
            unfold(State.of(place.step, place.store.read(place.step)[0]), place, RunDir(folder))
        except Damaged as error:
            raise UserError(f"{place.name} is damaged: {error}; {listed(place.store)}") from None
        yield Opened(Path(folder), Path(place.name))


def find(given: str) -> Place | None:
    """Return the checkpoint that a text names, or None for any other path.

    Raises UserError where it names one that is not there.
    """
    path = user_path(given)
    if path.is_file() or RunDir(path).config.is_file():
        return None
    if found := re.fullmatch(r"step_(\d{1,12})", path.name):
        return _there(Place(Store(str(path.parent)), int(found[1]), RunDir(path.parent.parent), given))
    folder, at, which = given.rpartition("@")
    if path.exists() or not at or not re.fullmatch(r"best|\d{1,12}", which):
        return None
    run = RunDir(user_path(folder))
    if not run.config.is_file():
        raise UserError(f"{given}: {folder} is no run directory; write the folder that `train` made before the @")
    config = load(run.config)
    store = store_of(config, run)
    step = best(store, run, config.headline) if which == "best" else int(which)
    if step is None:
        raise UserError(f"{given}: no checkpoint has a held-out score; write {folder}@STEP: {listed(store)}")
    return _there(Place(store, step, run, f"{folder}@{step}"))


def _there(place: Place) -> Place:
    if place.step not in place.store.steps():
        raise UserError(f"{place.name}: there is no checkpoint of step {place.step}; {listed(place.store)}")
    return place


def best(store: Store, run: RunDir, headline: str) -> int | None:
    """Return the step of the checkpoint with the best held-out `headline`, the later of two; None where none has it.

    The last step of a run is evaluated after its checkpoint is written, so that score is the run's.
    """
    evaluated = {row["step"]: row["overall"] for row in read_jsonl(run.evaluations)}
    scores = {}
    for step, about in store.known().items():
        score = about.get("score")
        score = headline_score(headline, evaluated.get(step, {})) if score is None else score
        if score is not None:
            scores[step] = score
    return max(scores, key=lambda step: (scores[step], step), default=None)


def listed(store: Store) -> str:
    """Say which checkpoints there are."""
    steps = store.steps()
    return f"{store.path} has those of steps {', '.join(map(str, steps))}" if steps else f"{store.path} has none"


def offer(run: Path) -> str:
    """Return the end of a sentence that offers the checkpoints of a run; it is empty where there are none."""
    files = RunDir(run)
    if not files.config.is_file():
        return ""
    with suppress(UserError):  # the sentence is about another mistake
        config = load(files.config)
        store = store_of(config, files)
        named = [*(["best"] if best(store, files, config.headline) is not None else []), *store.steps()]
        return f", or one of its checkpoints: {', '.join(f'{run}@{which}' for which in named)}" if named else ""
    return ""


def unfold(state: State, place: Place, run: RunDir) -> None:
    """Write what a run that had ended with `state` would have left: settings, records, grids, LoRA and critic.

    Raises Damaged where the state is not that of a run.
    """
    config = loads(json.dumps(state.facts["config"]), place.name)
    with reading():
        write_text(run.config, dump(config))
        for name, content in state.texts().items():
            write_text(run.path / name, content.decode())
        BACKBONES[config.backbone.kind](config.backbone).save_lora(state.learner.shipped(), run.lora)
        if critic := state.learner.critic():
            write_critic(run.critic, config, critic, state.facts["credit"])
        scores = {row["step"]: row for row in [*read_jsonl(place.run.evaluations), *read_jsonl(run.evaluations)]}
        facts = {
            "name": config.name,
            "steps": state.step,
            "headline": config.headline,
            "before": state.facts["before"],
            "after": scores.get(state.step, NOTHING),
            "config_hash": config_hash(config),
            "versions": state.facts["versions"],
        }
        write_json(run.summary, facts)
    for step in {0, state.step} & set(place.run.grid_steps()):  # grids of other steps show other weights
        run.grids.mkdir(exist_ok=True)
        shutil.copy(place.run.grid(step), run.grid(step))
    if place.run.grid_prompts.is_file() and run.grids.is_dir():
        shutil.copy(place.run.grid_prompts, run.grid_prompts)
