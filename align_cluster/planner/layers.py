"""Counts a deep network by its different layers: what a run of equal layers takes grows linearly with their number."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch

KEPT = 2  # equal layers in a row that are run; one more says what each further one adds


@dataclass(frozen=True)
class Run:
    """Describes equal layers that follow one another: their list, the place of the first, and how many there were."""

    layers: torch.nn.ModuleList
    first: int
    length: int


class Layers:
    """Shortens a network's runs of equal layers, in place, and tells what the whole network takes.

    A network of tens of layers takes as many seconds to count as layers; most of them are alike.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        """Leave KEPT + 1 layers of each longer run. The network cannot be used for anything else afterwards."""
        self.runs: list[Run] = []
        for layers in [module for module in network.modules() if isinstance(module, torch.nn.ModuleList)]:
            kept: list[torch.nn.Module] = []
            for _, group in groupby(layers, _structure):
                equal = list(group)
                if len(equal) > KEPT + 1:
                    self.runs.append(Run(layers, len(kept), len(equal)))
                    del equal[KEPT + 1 :]
                kept += equal
            _fill(layers, kept)

    def whole(self, count: Callable[[], Sequence[int]]) -> list[int]:
        """Return the numbers that `count` would find of the whole network."""
        with self._without(self.runs):
            base = list(count())
        total = list(base)
        for run in self.runs:
            with self._without([other for other in self.runs if other is not run]):
                longer = count()
            times = run.length - KEPT
            total = [value + times * (more - less) for value, more, less in zip(total, longer, base, strict=True)]
        return total

    @contextmanager
    def _without(self, runs: Sequence[Run]) -> Iterator[None]:
        """Take the last layer out of each of these runs."""
        lists = {id(run.layers): run.layers for run in runs}
        whole = {key: list(layers) for key, layers in lists.items()}
        left_out = {(id(run.layers), run.first + KEPT) for run in runs}
        for key, layers in lists.items():
            _fill(layers, [layer for place, layer in enumerate(whole[key]) if (key, place) not in left_out])
        try:
            yield
        finally:
            for key, layers in lists.items():
                _fill(layers, whole[key])


def _structure(layer: torch.nn.Module) -> tuple:
    """Return what equal layers have in common: the classes and settings of their parts, and all shapes."""
    return repr(layer), tuple((name, tuple(tensor.shape)) for name, tensor in layer.named_parameters())


def _fill(layers: torch.nn.ModuleList, kept: Sequence[torch.nn.Module]) -> None:
    layers._modules = {str(place): layer for place, layer in enumerate(kept)}
