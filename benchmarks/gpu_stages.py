"""The stages of gpu.py by name, each with its time limit in seconds; together they stay below eight minutes."""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gpu_networks as networks
import numpy as np
import torch
from gpu_bench import Bench
from gpu_learners import srpo, updates, whole_step
from gpu_plan import FOLDED, VARIANTS, Variant, plan
from gpu_rollouts import MODES, rollouts
from rows import add

from align_cluster.planner.fit import GIB
from align_cluster.rewards import REWARDS
from align_cluster.rewards.detectors import DETECTORS
from align_cluster.types import Prompt

ROOT = Path(__file__).parents[1]
BATCHES = (8, 32, 64)  # images that a reward scores at once


def sd35_rollout(bench: Bench) -> None:
    """SD3.5-M's shape: rollouts and decoding."""
    rollouts(bench, "sd35 nft", MODES)


def sd35_learner(bench: Bench) -> None:
    """SD3.5-M's shape: a sync, a whole step, and updates by algorithm and engine."""
    whole_step(bench)
    updates(bench, "sd35 nft", [*VARIANTS, FOLDED])
    updates(bench, "sd35 grpo", VARIANTS)


def flux(bench: Bench) -> None:
    """FLUX.1-dev's shape: whether SRPO fits, an update, and rollouts."""
    srpo(bench)
    updates(bench, "flux nft", [Variant(True)])
    rollouts(bench, "flux nft", MODES[:2])


def tests(bench: Bench) -> None:
    """Run the tests marked gpu, of the files that have any: others import packages that a GPU machine may lack."""
    import pytest

    class Reports:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                figures = {"value": report.duration, "unit": f"s, {report.outcome}"}
                if report.outcome == "failed":
                    figures = {"error": report.longreprtext[-300:]}
                if report.outcome == "skipped":
                    figures = {"skipped": str(report.longrepr[-1] if report.longrepr else "")}
                add(bench.rows, {"name": report.nodeid, **figures})

    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if _has_gpu_tests(path.read_text())]
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    options += ["-o", "addopts=-q --import-mode=importlib"]  # one process, also where xdist is not installed
    code = pytest.main([*options, *map(str, files)], plugins=[Reports()])
    verdict = {"error": f"pytest ended with exit code {int(code)}"} if code else {"value": 0, "unit": "exit code"}
    add(bench.rows, {"name": "pytest -m gpu", **verdict})


def _has_gpu_tests(text: str) -> bool:
    return "mark.gpu" in text or "SLOW_DEVICES" in text


def quickstart(bench: Bench) -> None:
    """Run a few steps of the quickstart by its command, on Ray, with a reward worker on a fifth of the card."""
    bench.row("quickstart, the whole system", lambda: _quickstart(bench))


def _quickstart(bench: Bench) -> dict[str, Any]:
    steps = 2 if bench.tiny else 6
    changes = [f"steps={steps}", "evaluate.count=4", "evaluate.every=0", "evaluate.grid_every=0"]
    changes += ["prompts_per_step=2", "rollout.group_size=4", "learner.updates_per_step=1"] if bench.tiny else []
    changes += ["rewards.clip.pool.workers=1"] + (["rewards.clip.pool.gpus=0.2"] if bench.device == "cuda" else [])
    with tempfile.TemporaryDirectory() as folder, CardWatch(bench.device) as watch:
        command = [sys.executable, "-m", "align_cluster.cli", "train", str(ROOT / "configs" / "quickstart.yaml")]
        given = [word for change in changes for word in ("--set", change)]
        done = subprocess.run([*command, "--out", folder, *given], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-250:]}")
        path = next(Path(folder).glob("*/summary.json"))
        summary = json.loads(path.read_text())
        metrics = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(row["throughput/images_per_s"] for row in metrics[1:])
    note = f"{summary['wall_seconds']:.1f} s for {steps} steps with start, workers lost: {summary['workers_lost']}"
    return {"value": speed, "unit": "images/s of a step", "note": note, **watch.most()}


class CardWatch:
    """Looks twice a second at what all processes together hold of the card."""

    def __init__(self, device: str) -> None:
        self.device, self.bytes, self.ended = device, 0, threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "CardWatch":
        if self.device == "cuda":
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    def _look(self) -> None:
        while not self.ended.wait(0.5):
            free, total = torch.cuda.mem_get_info()
            self.bytes = max(self.bytes, total - free)

    def most(self) -> dict[str, float]:
        """Return the most GiB; nothing on a CPU."""
        return {"gib": self.bytes / GIB} if self.device == "cuda" else {}


def rewards(bench: Bench) -> None:
    """Images/s of the reward models' shapes, from images in the CPU's memory to scores there."""
    side = 64 if bench.tiny else 512
    images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), side, side, 3), dtype=np.uint8)
    prompts = [Prompt(0, "a photo of a bench")] * len(images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips = {kind: str(networks.write_clip(kind, folder / kind, bench.tiny)) for kind in networks.CLIP_SIZES}
        settings = {
            "clip-l": {"kind": "clip_score", "path": clips["clip-l"]},
            "pickscore": {"kind": "pickscore", "path": clips["pickscore"], "processor": clips["pickscore"]},
            "hps": {"kind": "hps", **networks.hps_settings(folder, bench.tiny)},
        }
        with networks.random_weights(bench.device), networks.random_hps(bench.device):
            for label, given in settings.items():
                _reward(bench, label, given, images, prompts)
            detector = networks.write_mask2former(folder / "mask2former", bench.tiny)
            _detector(bench, detector, images)


def _reward(bench: Bench, label: str, given: dict[str, str], images: np.ndarray, prompts: list[Prompt]) -> None:
    kind = REWARDS[given["kind"]]
    reward = kind(kind.Config(**given))
    load = functools.partial(reward.load, bench.device, 4)
    _by_batch(bench, label, load, lambda size: reward.score(images[:size], prompts[:size]))


def _detector(bench: Bench, path: Path, images: np.ndarray) -> None:
    kind = DETECTORS["mask2former"]
    detector = kind(kind.Config(path=str(path)))
    load = functools.partial(detector.load, bench.device)
    _by_batch(bench, "mask2former", load, lambda size: detector.detect(images[:size], 0.3))


def _by_batch(bench: Bench, label: str, load: Callable[[], None], work: Callable[[int], object]) -> None:
    before = bench.held()
    loading = functools.cache(lambda: bench.time(load))

    def measured(size: int) -> dict[str, Any]:
        note = {"note": f"loaded in {loading():.1f} s"}
        work(size)
        peak = bench.peak(before)
        seconds = bench.seconds(lambda: work(size), enough=1.0)
        return {"value": size / seconds, "unit": "images/s", **peak(), **note}

    for size in (2,) if bench.tiny else BATCHES:
        bench.row(f"{label}, {size} images", lambda size=size: measured(size))


class Stage(NamedTuple):
    """A stage: what it does, and the seconds after which it ends, finished or not."""

    run: Callable[[Bench], None]
    limit_s: float


STAGES = {
    "plan": Stage(plan, 600),  # needs no card: run it before
    "rollout": Stage(sd35_rollout, 110),
    "learner": Stage(sd35_learner, 80),
    "tests": Stage(tests, 130),
    "quickstart": Stage(quickstart, 45),
    "flux": Stage(flux, 70),
    "rewards": Stage(rewards, 35),
}
