"""torchvision beside a torch that its operators were not built for, such as the CPU build.

open_clip brings torchvision, whose wheels are CUDA builds. Where their operators do not load, `import torchvision` ends
in "operator torchvision::nms does not exist", and transformers, peft and diffusers, which import it where they see it,
fail with it. Two declared operators are all it takes: images are transformed as ever, torchvision.ops.nms still raises.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Those that torchvision describes at import without asking whether they were loaded.
OPERATORS = ("nms", "qnms")

declared: list[Any] = []  # the operators vanish with their torch.library.Library; empty where torchvision needs no help


class TorchvisionGuard(MetaPathFinder):
    """Has torchvision imported once more, with the operators declared, where the first try fails for want of them.

    Costs nothing before somebody imports torchvision, and changes nothing where that works.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and spec.loader:
            spec.loader.exec_module = partial(_execute, spec.loader.exec_module)
        return spec


def install() -> None:
    """Guard this process from now on. To be called before anything can import torchvision."""
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
