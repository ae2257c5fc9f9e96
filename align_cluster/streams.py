"""Random streams that follow from all bits of a seed, the same on every worker, rank and device.

`torch.Generator.manual_seed` seeds a generator of the CPU with the lowest 32 bits alone, so of 100,000 seeds two draw
the same on average. A CUDA generator draws other numbers than a CPU's. Streams here are therefore the CPU's.
"""

import hashlib

import numpy as np
import torch

VERSION = 2  # of what a seed draws; a run goes on only with the version that it began with
WORDS = 624  # of 32 bits: the state of a Mersenne twister
_PLACE = slice(24, 24 + 8 * WORDS)  # the bytes of a generator's state that hold them, each in 64 bits


def hashed(text: str) -> int:
    """Return 64 bits of blake2b over a text: what the same name gives in every version and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def stream(seed: int) -> torch.Generator:
    """Return the random stream of a seed, a whole number from 0 to below 2^64.

    The state of the CPU's generator, a Mersenne twister, is SHAKE128 of the seed's bytes, so no bit of the seed is lost
    and seeds next to each other have nothing in common.
    """
    words = np.frombuffer(hashlib.shake_128(seed.to_bytes(8, "little")).digest(4 * WORDS), "<u4")
    generator = torch.Generator().manual_seed(seed)
    state = generator.get_state()
    state[_PLACE].view(torch.int64).copy_(torch.from_numpy(words.astype(np.int64)))
    return generator.set_state(state)
