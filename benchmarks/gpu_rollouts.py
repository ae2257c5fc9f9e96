"""Stages of gpu.py that draw: images/s of the real sampler, by rows and by the way the network is called."""

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gpu_networks as networks
import numpy as np
import torch
from gpu_bench import Bench
from gpu_plan import CASES, case, rollout_rows

from align_cluster.config.run import RunConfig
from align_cluster.rollouts.sampler import Sampler

WARM_STEPS = 2  # denoising steps of a draw that compiles, captures and fills caches


class Mode(NamedTuple):
    """A way to call the network: blocks compiled, LoRA merged, predictions as CUDA graphs, another attention kernel."""

    name: str
    compiled: bool = False
    merged: bool = False
    graphs: bool = False
    attention: str | None = None


MODES = [
    Mode("eager"),
    Mode("compiled", compiled=True),
    Mode("compiled, merged", compiled=True, merged=True),
    Mode("graphs", graphs=True),
    Mode("eager, merged", merged=True),
    Mode("eager, cuDNN attention", attention="_native_cudnn"),
    Mode("compiled, graphs", compiled=True, graphs=True),
]


def rollouts(bench: Bench, name: str, modes: list[Mode]) -> None:
    """Measure one case in all modes."""
    reference: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder, networks.random_weights(bench.device):
        for mode in modes:
            _mode(bench, name, mode, Path(folder), reference)


def _mode(bench: Bench, name: str, mode: Mode, folder: Path, reference: dict[str, np.ndarray]) -> None:
    model = CASES[name][0]
    label, sizes = f"{model} rollout, {mode.name}", rollout_rows(name, bench.tiny)
    if bench.device == "cpu" and (mode.compiled or mode.graphs or mode.attention):
        bench.row(label, lambda: {"skipped": "it is for a card; a CPU has no graphs and compiles for minutes"})
        return
    labels = {rows: f"{label}, {rows} rows" for rows in sizes}
    if reference and bench.done.issuperset(labels.values()):
        return
    settings = [f"backbone.compile={str(mode.compiled).lower()}"]
    settings += [f"backbone.attention={mode.attention}"] if mode.attention else []
    config = case(name, folder, bench.tiny, *settings)
    before = bench.held()
    sampler = Sampler(config.backbone, 4, "gpu", bench.device, mode.merged)
    if mode.graphs:
        sampler.backbone.velocity = Graphed(sampler.backbone.velocity)
    drawing = Drawing(bench, sampler, config, bench.plan.get(name, {}), before)
    if not reference:  # of the eager network, which comes first
        reference |= drawing.adapted(sizes[0])
    bench.row(f"{label}, new adapter", lambda: drawing.follows(reference, sizes[0]))
    for rows, row in labels.items():
        bench.row(row, lambda rows=rows: drawing.images_per_second(rows))
    if mode.name == "eager":
        _parts(bench, model, drawing, sizes)
    networks.discard(sampler.denoiser)
    networks.discard(sampler.backbone._vae)
    bench.free()


def _parts(bench: Bench, model: str, drawing: "Drawing", sizes: tuple[int, ...]) -> None:
    for rows in sizes:
        bench.row(f"{model} decoding, {rows} rows", lambda rows=rows: drawing.decoded(rows))
    few, many = min(sizes), max(sizes)
    bench.row(f"{model} decoding, {many} rows, {few} at once", lambda: drawing.decoded(many, few))
    if bench.device == "cuda":
        bench.row(f"{model} rollout, waits for the card", lambda: drawing.waits(sizes[-1]))
        drawing.sampler.backbone._vae.decoder.compile()
        bench.row(f"{model} decoding, compiled, {sizes[0]} rows", lambda: drawing.decoded(sizes[0]))


class Graphed:
    """Replays a backbone's prediction as one CUDA graph for each shape of its inputs, which are copied into it.

    An input that is None stays None.
    """

    def __init__(self, velocity: Callable[..., torch.Tensor]) -> None:
        self.velocity, self.graphs = velocity, {}

    def __call__(self, denoiser: torch.nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
        key = tuple(None if tensor is None else tensor.shape for tensor in inputs)
        if key not in self.graphs:
            own = [None if tensor is None else tensor.clone() for tensor in inputs]
            self.graphs[key] = self._captured(denoiser, own)
        graph, own, output = self.graphs[key]
        for mine, given in zip(own, inputs, strict=True):
            if mine is not None:
                mine.copy_(given)
        graph.replay()
        return output.clone()

    def _captured(self, denoiser: torch.nn.Module, own: list[torch.Tensor | None]) -> tuple[Any, list, torch.Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what the first calls allocate and choose must not be part of the graph
            for _ in range(3):
                self.velocity(denoiser, *own)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.velocity(denoiser, *own)
        return graph, own, output


@dataclass(frozen=True)
class Drawing:
    """A sampler and its figures. `before` is what the device held before it came."""

    bench: Bench
    sampler: Sampler
    config: RunConfig
    planned: dict[str, Any]
    before: int

    def adapted(self, rows: int) -> dict[str, np.ndarray]:
        """Return latents under one adapter and, after it was adopted, under another."""
        latents = {}
        for version, name in ((1, "first"), (2, "second")):
            self.sampler.adopt(*networks.random_adapter(self.sampler, version))
            latents[name] = networks.draw(self.sampler, self.config, rows, WARM_STEPS)[1].x0
        return latents

    def follows(self, reference: dict[str, np.ndarray], rows: int) -> dict[str, Any]:
        """Compare latents under a new adapter with the eager network's: compiled code and graphs must see it."""
        away = distance(self.adapted(rows)["second"], reference["second"])
        moved = distance(reference["first"], reference["second"])
        if not away < moved / 2:
            raise RuntimeError(
                f"a new adapter moves the eager network's latents by {moved:.2g}, and these are {away:.2g} off"
            )
        manifest, buffer = networks.random_adapter(self.sampler, 2)
        adopting = self.bench.seconds(lambda: self.sampler.adopt(manifest, buffer))
        note = f"the eager latents moved by {moved:.2g}; adopted in {1000 * adopting:.0f} ms"
        return {"value": away, "unit": "off the eager latents", "note": note}

    def images_per_second(self, rows: int) -> dict[str, Any]:
        """Draw whole training rollouts, decoding included."""
        networks.draw(self.sampler, self.config, rows, WARM_STEPS)
        peak = self.bench.peak(self.before)
        seconds = self.bench.seconds(lambda: networks.draw(self.sampler, self.config, rows))
        denoising = self.config.rollout.steps * self.planned.get("draw_tflop", 0)
        figures = {"value": rows / seconds, "unit": "images/s", **self._planned("sampler_gib", rows), **peak()}
        if "sd35" in self.config.backbone.path:
            figures["goal"] = ">= 14"
        return figures | self.bench.share(rows * (denoising + self.planned.get("decode_tflop", 0)), seconds)

    def decoded(self, rows: int, at_once: int | None = None) -> dict[str, Any]:
        """Decode final latents to images in the CPU's memory, `at_once` of them or all in one pass."""
        backbone, at_once = self.sampler.backbone, at_once or rows
        latents = torch.randn(rows, *backbone.latent_shape, device=self.bench.device)

        def decode() -> None:
            for part in latents.split(at_once):
                backbone.decode(part)

        decode()
        peak = self.bench.peak(self.bench.held())
        seconds = self.bench.seconds(decode)
        figures = {"value": rows / seconds, "unit": "images/s", **self._planned("decode_gib", at_once), **peak()}
        return figures | self.bench.share(rows * self.planned.get("decode_tflop", 0), seconds)

    def waits(self, rows: int) -> dict[str, Any]:
        """Count how often the CPU waits for the card in a rollout; each time the card runs out of work."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                networks.draw(self.sampler, self.config, rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = [one for one in caught if "synchronizing" in str(one.message)]
        places = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in found)
        note = ", ".join(f"{place} {count}" for place, count in places.most_common(6))
        return {"value": len(found), "unit": f"times in {self.config.rollout.steps} steps", "note": note}

    def _planned(self, what: str, rows: int) -> dict[str, float]:
        value = self.planned.get(what, {}).get(str(rows))
        return {} if value is None else {"planned_gib": value}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return ||a - b|| / ||b||."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
