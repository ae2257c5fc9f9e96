"""Make `import torchvision` work beside a torch that lacks its compiled operators, such as the CPU build.

open_clip brings torchvision, and its wheels are CUDA builds. If their operators do not load, `import torchvision`
raises "operator torchvision::nms does not exist", and transformers, peft and diffusers fail with it, because they
import torchvision if it is installed. It is enough to declare two operators: image transforms then work, and
torchvision.ops.nms still raises.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# torchvision registers shape functions for these operators at import, without a check that they were loaded.
OPERATORS = ("nms", "qnms")

declared: list[Any] = []  # keeps the torch.library.Library alive, and with it the operators


class TorchvisionGuard(MetaPathFinder):
    """Imports torchvision a second time, with the operators declared, if the first import fails.

    It costs nothing before torchvision is imported, and changes nothing if the first import works.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return torchvision's usual import spec with a guarded loader, and None for every other module."""
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and spec.loader:
            spec.loader.exec_module = partial(_execute, spec.loader.exec_module)
        return spec


def install() -> None:
    """Guard this process from now on. Call this before anything can import torchvision."""
    sys.meta_path.insert(0, TorchvisionGuard())


def _execute(run: Callable[[ModuleType], None], module: ModuleType) -> None:
    try:
        run(module)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        import torch

        declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for operator in OPERATORS:
            declared[-1].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        run(module)
