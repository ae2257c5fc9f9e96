import numpy as np
import pytest
import torch

from align_cluster.conditions.cache import Cache
from align_cluster.conditions.precision import to_array, to_tensor
from align_cluster.types import Condition, Perturbation

BITS = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    whole = torch.int16 if one.dtype == torch.bfloat16 else torch.int32
    return one.dtype == other.dtype and torch.equal(one.view(whole), other.view(whole))


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def tensor(request) -> torch.Tensor:
    """Every number of the type, or as many patterns of its upper half: NaN, infinities and subnormal ones too."""
    if request.param == torch.bfloat16:
        return BITS.view(torch.bfloat16).view(256, 256)
    return torch.stack([torch.zeros_like(BITS), BITS], 1).view(torch.float32).view(256, 256)


def test_a_tensor_comes_back_bit_for_bit(tensor):
    for part in (tensor, tensor.t(), tensor[3:4, ::2], tensor[:, 0], tensor[0, :0]):
        array = to_array(part)
        assert array.shape == tuple(part.shape) and array.nbytes == part.numel() * part.element_size()
        array.flags.writeable = False  # as in Ray's shared memory
        assert same_bits(to_tensor(array), part.contiguous())


def test_what_is_neither_fp32_nor_bf16_becomes_fp32():
    for dtype in (torch.float64, torch.float16):
        array = to_array(torch.full((2, 3), 0.5, dtype=dtype))
        assert array.dtype == np.float32 and (array == 0.5).all()


def test_a_tensor_is_a_copy_that_cannot_change_the_record(tensor):
    array = to_array(tensor.clone())
    before = array.copy()
    to_tensor(array).zero_()
    assert array.tobytes() == before.tobytes()


def test_records_of_either_type_come_back_from_disk_bit_for_bit(tmp_path, tensor):
    variants = torch.stack([tensor, tensor])
    records = (
        Condition("abcd", to_array(tensor), to_array(tensor[0, :0])),
        Perturbation("abcd", to_array(variants), to_array(tensor), np.ones(2), 0.5),
    )
    for record in records:
        Cache(tmp_path, type(record)).put(record)
        found = Cache(tmp_path, type(record)).get("abcd")
        for name, value in vars(record).items():
            if isinstance(value, np.ndarray) and name != "cosines":
                assert same_bits(to_tensor(getattr(found, name)), to_tensor(value))
    assert records[0].nbytes == tensor.numel() * tensor.element_size()
    assert records[1].nbytes == 3 * records[0].nbytes + 16
