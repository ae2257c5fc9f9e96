"""Counts the bytes and FLOPs of computations by running the real code on tensors that have shapes and no values.

FakeTensorMode replaces every operator, also under autograd and activation checkpointing. So no formula describes a
network here: autograd keeps what it would keep of real tensors.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# PyTorch's formulas for the FLOPs of operators lack the fused attention of the CPU, which keeps the same tensors as the
# one of GPUs.
FLOPS = flop_registry | {
    getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{end}"): flop_registry[
        getattr(aten, f"_scaled_dot_product_flash_attention{end}")
    ]
    for end in ("", "_backward")
}
# Operators that autocast runs in fp32 on a GPU and in bf16 on a CPU (ATen/autocast_mode.h), as far as networks use them
# on activations.
FP32_ON_GPUS = "layer_norm rms_norm group_norm softmax.int rsqrt pow.Tensor_Scalar upsample_nearest2d".split()


class Usage(NamedTuple):
    """The most bytes that one computation held at once, beyond those held before it, and its FLOPs."""

    bytes: int
    flops: int


class Counter(TorchDispatchMode):
    """Adds up FLOPs, and follows the bytes of tensors from the operator that makes them until nothing refers to them.

    PyTorch's own FlopCounterMode would keep tensors alive that activation checkpointing releases.
    """

    def __init__(self) -> None:
        """Start at nothing."""
        super().__init__()
        self.bytes = self.most = self.flops = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operator and count its FLOPs and the storages that it makes."""
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in FLOPS:
            self.flops += FLOPS[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)

    def adopt(self, module: torch.nn.Module) -> torch.nn.Module:
        """Replace the tensors of a module on the meta device by counted ones, in place."""
        for part in module.modules():
            for tensors in (part._parameters, part._buffers, vars(part)):
                for name, tensor in tensors.items():
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.empty_like(tensor, device="cpu")
                        tensors[name] = torch.nn.Parameter(fake, tensor.requires_grad)
                    elif isinstance(tensor, torch.Tensor):
                        tensors[name] = torch.empty_like(tensor, device="cpu")
        return module

    def measure(self, run: Callable[[], Any]) -> Usage:
        """Run a computation and return what it takes, its result included."""
        before, flops = self.bytes, self.flops
        self.most = self.bytes
        _ = run()
        return Usage(self.most - before, self.flops - flops)


@contextmanager
def counting(device: str) -> Iterator[Counter]:
    """Count what a cpu or a cuda device would take. Tensors that are made in this context have no values.

    They all claim to be on the CPU; for cuda, autocast follows the rules of GPUs.
    """
    rules = autocast_of_gpus() if device == "cuda" else nullcontext()
    with rules, FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:
        yield counter


@contextmanager
def autocast_of_gpus() -> Iterator[None]:
    """Let autocast on the CPU run FP32_ON_GPUS in fp32, as it does on GPUs.

    `torch.autocast("cuda")` turns itself off where there is no GPU, and PyTorch without CUDA cannot even slice tensors
    that claim to be on one.
    """
    library = torch.library.Library("aten", "IMPL")
    for name in FP32_ON_GPUS:
        op, _, overload = name.partition(".")
        library.impl(name, _in_fp32(getattr(getattr(aten, op), overload or "default")), "AutocastCPU")
    try:
        yield
    finally:
        library._destroy()


def _in_fp32(op: Any) -> Callable[..., torch.Tensor]:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return op(*(arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args), **kwargs)

    return call
