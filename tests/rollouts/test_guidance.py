import numpy as np
import pytest
import torch

from align_cluster.conditions.precision import to_array
from align_cluster.rollouts.guidance import TextBatch
from align_cluster.types import Condition

CPU = torch.device("cpu")


def encoded(key: str, dtype: torch.dtype, seed: int) -> tuple[Condition, torch.Tensor, torch.Tensor]:
    """A condition, and the tensors that it holds."""
    generator = torch.Generator().manual_seed(seed)
    sequence, pooled = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 8), (3,)))
    return Condition(key, to_array(sequence), to_array(pooled)), sequence, pooled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_holds_each_rows_encoding_in_fp32_without_loss(dtype):
    one, *ours = encoded("one", dtype, 0)
    other, *theirs = encoded("other", dtype, 1)
    null, *empty = encoded("null", dtype, 2)
    text = TextBatch.build([one, other, one], null, CPU)
    found = [(text.sequence, text.null_sequence), (text.pooled, text.null_pooled)]
    for (rows, nulls), a, b, c in zip(found, ours, theirs, empty, strict=True):
        assert rows.dtype == nulls.dtype == torch.float32
        assert torch.equal(rows, torch.stack([a.float(), b.float(), a.float()]))
        assert torch.equal(nulls, torch.stack([c.float()] * 3))
    assert TextBatch.build([one], None, CPU).null_sequence is None


def test_rows_that_share_a_condition_do_not_share_memory():
    one, sequence, _ = encoded("one", torch.float32, 0)
    one.sequence.flags.writeable = False  # as in Ray's shared memory
    text = TextBatch.build([one, one], None, CPU)
    text.sequence[0].zero_()
    assert torch.equal(text.sequence[1], sequence)
    np.testing.assert_array_equal(one.sequence, sequence.numpy())
