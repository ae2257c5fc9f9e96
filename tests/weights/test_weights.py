import numpy as np
import pytest
import torch

from align_cluster.types import Manifest, Receipt
from align_cluster.weights import ALIGN, ROW, adopt, check, checksum, publish, view


def mixed_state(seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of several types and shapes, among them a scalar, an odd size and one beyond a checksum row."""
    rng = np.random.default_rng(seed)
    return {
        "z.wide": rng.standard_normal((37, 129)).astype(np.float32),
        "a.half": rng.standard_normal(7).astype(np.float16),
        "m.double": rng.standard_normal((3, 1, 5)),
        "b.count": np.array(41, dtype=np.int64),
        "b.bytes": rng.integers(0, 256, 13, dtype=np.uint8),
        "c.big": rng.standard_normal(3 * ROW // 4 + 5).astype(np.float32),
    }


def parameters_like(state: dict[str, np.ndarray]) -> dict[str, torch.nn.Parameter]:
    return {
        name: torch.nn.Parameter(torch.zeros(value.shape, dtype=torch.from_numpy(np.array(value)).dtype), False)
        for name, value in state.items()
    }


def receipt(manifest: Manifest, **changes: object) -> Receipt:
    facts = {"worker": "s", "version": manifest.version, "bound": len(manifest.tensors), "checksum": manifest.checksum}
    return Receipt(**(facts | changes), seconds=0.0)


def test_a_state_of_mixed_types_and_shapes_arrives_bit_for_bit():
    state = mixed_state()
    manifest, buffer = publish(state, 7)
    buffer.flags.writeable = False
    parameters = parameters_like(state)
    assert adopt(manifest, buffer, parameters) == manifest.checksum
    for name, value in state.items():
        assert parameters[name].numpy().tobytes() == value.tobytes() and parameters[name].shape == value.shape
    assert manifest.version == 7 and manifest.nbytes == len(buffer)


def test_tensors_are_laid_out_by_name_aligned_and_apart():
    manifest, buffer = publish(mixed_state(), 0)
    names = [tensor.name for tensor in manifest.tensors]
    assert names == sorted(names)
    ends = [tensor.offset + view(buffer, tensor).nbytes for tensor in manifest.tensors]
    starts = [tensor.offset for tensor in manifest.tensors]
    assert all(start % ALIGN == 0 for start in starts)
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


def test_the_order_of_a_state_does_not_matter_and_equal_states_have_equal_checksums():
    state = mixed_state()
    first, second = publish(state, 1), publish(dict(reversed(state.items())), 1)
    assert first[0] == second[0] and np.array_equal(first[1], second[1])


def test_a_non_contiguous_array_is_published_as_its_values():
    value = np.arange(12, dtype=np.float32).reshape(3, 4).T
    manifest, buffer = publish({"a": value}, 0)
    np.testing.assert_array_equal(view(buffer, manifest.tensors[0]), value)


@pytest.mark.parametrize("size", [1, 7, 8, ROW - 1, ROW, ROW + 1, 5 * ROW + 3])
def test_every_flipped_bit_changes_the_checksum(size):
    rng = np.random.default_rng(size)
    buffer = rng.integers(0, 256, size, dtype=np.uint8)
    seen = {checksum(buffer)}
    positions = {0, size - 1, *rng.integers(0, size, 200).tolist()}
    for position in positions:
        wrong = buffer.copy()
        wrong[position] ^= 1 << int(rng.integers(8))
        seen.add(checksum(wrong))
    assert len(seen) == 1 + len(positions)


def test_a_flipped_byte_of_any_tensor_is_seen_in_the_receipt():
    state = mixed_state()
    manifest, buffer = publish(state, 1)
    rng = np.random.default_rng(1)
    for tensor in manifest.tensors:
        size = view(buffer, tensor).nbytes
        for offset in {0, size - 1, *rng.integers(0, size, 10).tolist()}:
            wrong = buffer.copy()
            wrong[tensor.offset + offset] ^= 0x10
            held = adopt(manifest, wrong, parameters_like(state))
            with pytest.raises(RuntimeError, match="holds weights 1 with checksum"):
                check(manifest, [receipt(manifest, checksum=held)], 1)


@pytest.mark.parametrize("shape", [(4,), (16, 32), (ROW // 4,), (2, ROW)])
def test_tensors_that_swapped_places_are_seen(shape):
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    assert publish({"a": a, "b": b}, 1)[0].checksum != publish({"a": b, "b": a}, 1)[0].checksum


def test_swapped_words_rows_and_lost_tails_are_seen():
    rng = np.random.default_rng(3)
    words = rng.integers(0, 2**63, 4 * ROW // 8, dtype=np.uint64)
    before = checksum(words.view(np.uint8))
    for i, j in [(0, 1), (0, ROW // 8), (5, 3 * ROW // 8 + 5), (7, 2 * ROW // 8 + 9)]:
        swapped = words.copy()
        swapped[[i, j]] = swapped[[j, i]]
        assert checksum(swapped.view(np.uint8)) != before
    rows = words.reshape(4, -1)[[1, 0, 2, 3]].copy()
    assert checksum(rows.ravel().view(np.uint8)) != before
    assert checksum(words[:-1].copy().view(np.uint8)) != before
    zeros = np.zeros(2 * ROW, dtype=np.uint8)
    assert checksum(zeros) != checksum(zeros[:ROW]) != checksum(zeros[:8])


def test_a_parameter_that_cannot_hold_the_published_precision_is_seen():
    manifest, buffer = publish({"a": np.array([1.0, 1.0 + 2**-20], dtype=np.float32)}, 1)
    held = adopt(manifest, buffer, {"a": torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))})
    assert held != manifest.checksum


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.pop("a.half"), r"0 missing \[\], unknown \['a.half'\]"),
        (lambda p: p.update(extra=p["a.half"]), r"1 missing \['extra'\], unknown \[\]"),
        (lambda p: p.clear(), "weights 3 do not fit"),
        (lambda p: p.update({"a.half": torch.nn.Parameter(torch.zeros(8))}), r"a.half: published \(7,\), expected"),
        (lambda p: p.update({"z.wide": torch.nn.Parameter(torch.zeros(129, 37))}), r"z.wide: published \(37, 129\)"),
    ],
)
def test_names_or_shapes_that_do_not_fit_are_errors_and_change_nothing(spoil, message):
    state = mixed_state()
    parameters = parameters_like(state)
    spoil(parameters)
    with pytest.raises(RuntimeError, match=message):
        adopt(*publish(state, 3), parameters)
    assert all((parameter == 0).all() for parameter in parameters.values())


def test_nothing_published_is_an_error():
    with pytest.raises(RuntimeError, match="do not fit"):
        adopt(*publish({}, 1), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bound": 0}, "s bound 0 of 6 tensors"),
        ({"bound": 5}, "s bound 5 of 6 tensors"),
        ({"version": 2}, "s holds weights 2"),
        ({"checksum": "0" * 32}, "published were 3 with"),
    ],
)
def test_check_refuses_a_receipt_that_proves_nothing(changes, message):
    manifest, _ = publish(mixed_state(), 3)
    with pytest.raises(RuntimeError, match=message):
        check(manifest, [receipt(manifest), receipt(manifest, **changes)], 2)


def test_check_wants_one_receipt_of_every_worker():
    manifest, _ = publish(mixed_state(), 3)
    check(manifest, [receipt(manifest)] * 2, 2)
    for receipts in ([], [receipt(manifest)]):
        with pytest.raises(RuntimeError, match=f"{len(receipts)} receipts from 2 samplers"):
            check(manifest, receipts, 2)
    empty = Manifest(3, (), 0, checksum(np.zeros(0, dtype=np.uint8)))
    with pytest.raises(RuntimeError, match="bound 0 of 0"):
        check(empty, [receipt(empty)], 1)
