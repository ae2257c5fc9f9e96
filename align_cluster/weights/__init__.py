"""Weight sync: one flat buffer, a manifest of its contents, and receipts that prove its adoption.

state -> publish() -> (Manifest, uint8 buffer) -> object store -> adopt() on every sampler -> Receipt -> check()
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch

from align_cluster.types import Manifest, Receipt, Tensor

ALIGN = 64  # bytes; keeps every tensor's view aligned for vector loads
ROW = 8192  # bytes of one checksum row


def checksum(buffer: np.ndarray) -> str:
    """Return a position-sensitive 128-bit checksum of a uint8 buffer, computed at memory speed.

    The buffer is read as a matrix of 64-bit words; its row sums and column sums (mod 2^64) are hashed. A changed word,
    or two words that swap places, changes a row sum or a column sum.
    """
    whole = len(buffer) // ROW * ROW
    digest = hashlib.blake2b(len(buffer).to_bytes(8, "little"), digest_size=16)
    if whole:
        words = buffer[:whole].view(np.uint64).reshape(-1, ROW // 8)
        digest.update(words.sum(0, dtype=np.uint64).tobytes())
        digest.update(words.sum(1, dtype=np.uint64).tobytes())
    digest.update(buffer[whole:].tobytes())
    return digest.hexdigest()


def publish(state: dict[str, np.ndarray], version: int) -> tuple[Manifest, np.ndarray]:
    """Lay named arrays out in one uint8 buffer, sorted by name, and describe it in a manifest."""
    tensors, offset = [], 0
    for name in sorted(state):
        tensors.append(Tensor(name, state[name].shape, str(state[name].dtype), offset))
        offset += -(-state[name].nbytes // ALIGN) * ALIGN
    buffer = np.zeros(offset, dtype=np.uint8)
    for tensor in tensors:
        view(buffer, tensor)[...] = state[tensor.name]
    return Manifest(version, tuple(tensors), offset, checksum(buffer)), buffer


def view(buffer: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Return the part of a buffer that one tensor occupies, without a copy."""
    dtype = np.dtype(tensor.dtype)
    size = int(np.prod(tensor.shape, dtype=np.int64)) * dtype.itemsize
    return buffer[tensor.offset : tensor.offset + size].view(dtype).reshape(tensor.shape)


def adopt(manifest: Manifest, buffer: np.ndarray, parameters: dict[str, torch.nn.Parameter]) -> str:
    """Copy every tensor into the parameter of its name, and return the checksum of the parameters' new content.

    Raises RuntimeError if names or shapes differ, and then changes nothing. A weight that binds to no parameter is an
    error, never a warning.
    """
    names = {tensor.name for tensor in manifest.tensors}
    if names != parameters.keys() or not names:
        missing, extra = sorted(parameters.keys() - names), sorted(names - parameters.keys())
        raise RuntimeError(
            f"weights {manifest.version} do not fit: {len(missing)} missing {missing[:2]}, unknown {extra[:2]}"
        )
    for tensor in manifest.tensors:  # all shapes are checked before the first copy, so that an error changes nothing
        expected = tuple(parameters[tensor.name].shape)
        if expected != tensor.shape:
            raise RuntimeError(f"{tensor.name}: published {tensor.shape}, expected {expected}")
    held = np.zeros(manifest.nbytes, dtype=np.uint8)
    with torch.no_grad():
        for tensor in manifest.tensors:
            parameter = parameters[tensor.name]
            # torch.from_numpy would warn about the buffer's read-only shared memory, so the copy goes through `held`.
            part = view(held, tensor)
            part[...] = view(buffer, tensor)
            parameter.copy_(torch.from_numpy(part))
            part[...] = parameter.detach().cpu().numpy()
    return checksum(held)


def check(manifest: Manifest, receipts: Iterable[Receipt], expected: int) -> None:
    """Raise RuntimeError unless `expected` workers hold exactly the published weights."""
    receipts = list(receipts)
    if len(receipts) != expected:
        raise RuntimeError(f"weights {manifest.version}: {len(receipts)} receipts from {expected} samplers")
    for receipt in receipts:
        if receipt.bound != len(manifest.tensors) or receipt.bound == 0:
            raise RuntimeError(f"{receipt.worker} bound {receipt.bound} of {len(manifest.tensors)} tensors")
        if (receipt.version, receipt.checksum) != (manifest.version, manifest.checksum):
            raise RuntimeError(
                f"{receipt.worker} holds weights {receipt.version} with checksum {receipt.checksum}, "
                f"published were {manifest.version} with {manifest.checksum}"
            )
