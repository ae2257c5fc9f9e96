"""The form in which a record's arrays hold tensors. This file alone knows it.

A text encoder in bf16 gives bf16 encodings, which would take twice the room in fp32. NumPy has no such type.
"""

import numpy as np
import torch


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return an array of the same shape that holds the tensor without loss.

    A bf16 tensor becomes uint16, which are its bits. Any other becomes fp32.
    """
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    return tensor.float().numpy()


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Return the tensor that `to_array` was given. It is a copy, because records may lie in read-only shared memory."""
    tensor = torch.tensor(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
