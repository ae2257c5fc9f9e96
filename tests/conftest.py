"""Settings of every test process, in force before Ray or the hub client can be imported."""

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ALIGN_CLUSTER_CACHE"] = CACHE = tempfile.mkdtemp(prefix="align-cluster-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for worker processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402

from align_cluster.backbones.sd3 import SD3  # noqa: E402

LONG = ("system", "benchmarks", "tests")  # folders whose tests run whole commands and runs

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package


@pytest.hookimpl(wrapper=True)  # so that it begins before xdist reads the groups, which a plain hook does not
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Let two processes share the tests: one begins with all that need the session's Ray, so that there is only one of
    it, and the rest goes file by file to whichever process is free, the long ones first: a long file at the end would
    leave one process idle."""
    items.sort(key=lambda item: ("local_ray" not in item.fixturenames, item.path.parent.name not in LONG))
    for item in items:
        group = "ray" if "local_ray" in item.fixturenames else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))
    yield
    if getattr(config.option, "loadgroup", False) and not all("@" in item.nodeid for item in items):
        raise pytest.UsageError("this pytest-xdist cannot group the tests of this pytest; install the extra dev anew")


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def settings() -> SD3.Config:
    """The embedded pipeline in fp32 with a small LoRA whose alpha is not its rank."""
    return SD3.Config(precision="fp32", lora={"rank": 4, "alpha": 6})


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function kind -> folder of a small random pipeline for that backbone, which tests/backbones/tiny_KIND.py builds
    and stock diffusers writes."""

    @cache
    def folder(kind: str) -> Path:
        builder = importlib.import_module(f".backbones.tiny_{kind}", __package__)
        path, state = tmp_path_factory.mktemp(kind) / "pipeline", torch.get_rng_state()
        torch.manual_seed(0)
        builder.build(path)
        torch.set_rng_state(state)
        return path

    return folder


@pytest.fixture(scope="session")
def stock() -> Iterator[object]:
    """The embedded pipeline as stock diffusers loads it."""
    from diffusers import StableDiffusion3Pipeline

    from align_cluster.embedded import pipeline_path

    pipe = StableDiffusion3Pipeline.from_pretrained(
        pipeline_path(), text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    yield pipe
