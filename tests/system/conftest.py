"""Real Ray runs of the embedded model, small enough for a laptop.

One Ray serves all of these tests, in a folder of its own, so that two test sessions on one machine never meet.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from align_cluster.cluster.preload import Preload, imports
from align_cluster.config.load import config_hash, load
from align_cluster.config.run import RunConfig

from .. import inprocess
from ..inprocess import Finished

TINY = Path(__file__).parent / "tiny.yaml"


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and its summary.json."""

    path: Path
    summary: dict[str, Any]


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A temporary folder with a short path: Ray puts Unix sockets there, whose paths end at 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ac-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def preload() -> Iterator[Preload]:
    """What the session's workers are forks of."""
    with Preload() as ready:
        ready.load(imports(load(TINY)))
        yield ready


@pytest.fixture(scope="session")
def local_ray(short_folder: Path, preload: Preload) -> Iterator[Any]:
    """The session's Ray with two cores."""
    from align_cluster.cluster import private  # before ray, see there

    ray = private.ray

    before = {name: os.environ.get(name) for name in ("ALIGN_CLUSTER_CACHE", "RAY_ADDRESS")}
    os.environ["ALIGN_CLUSTER_CACHE"] = str(short_folder / "cache")
    os.environ.pop("RAY_ADDRESS", None)
    private.start(
        preload.used_by_ray,
        num_cpus=2,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=400_000_000,
        _temp_dir=str(short_folder / "ray"),
    )
    yield ray
    ray.shutdown()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def by_value(request: pytest.FixtureRequest, local_ray: Any) -> Iterator[None]:
    """Classes and functions of the test's module (and of this one) travel to workers, which cannot import it."""
    modules = [request.module, sys.modules[__name__]]
    for module in modules:
        local_ray.cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        local_ray.cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture
def pid_of(local_ray: Any, by_value: None) -> Callable[[Any], int]:
    """Function actor -> id of its process, once it has started."""
    return lambda actor: local_ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., RunConfig]:
    """Function (kind, *overrides) -> the job of tiny.yaml with algorithm `kind`."""
    return lambda kind, *overrides: load(TINY, [f"name={kind}", f"algorithm.kind={kind}", *overrides])


@pytest.fixture(scope="session")
def train(local_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunConfig], Run]:
    """Function config -> Run, on the session's Ray."""

    def go(config: RunConfig) -> Run:
        from align_cluster.loop import driver

        path = driver.train(config, tmp_path_factory.mktemp("runs"))
        return Run(path, json.loads((path / "summary.json").read_text()))

    return go


@pytest.fixture(scope="session")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """Function (config, device="cpu") -> what its run ends with in this process, without Ray; runs of equal settings
    are run once."""
    finished: dict[tuple[str, str], Finished] = {}

    def go(config: RunConfig, device: str = "cpu") -> Finished:
        key = config_hash(config), device
        if key not in finished:
            finished[key] = inprocess.train(config, tmp_path_factory.mktemp("in-process"), device)
        return finished[key]

    return go


@pytest.fixture(scope="session")
def runs(tiny: Callable[..., RunConfig], train: Callable[[RunConfig], Run]) -> dict[str, Run]:
    """The undisturbed runs, with two samplers, that others are compared with: by algorithm, each made at first use."""

    class Runs(dict):
        def __missing__(self, kind: str) -> Run:
            run = self[kind] = train(tiny(kind))
            assert run.summary["workers_lost"] == 0, "ask for the undisturbed run before you disturb another one"
            return run

    return Runs()
