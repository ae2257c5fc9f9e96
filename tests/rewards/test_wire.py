import numpy as np
import pytest

from align_cluster.rewards.wire import decode_answer, encode_answer
from align_cluster.types import Failure, Scores


def test_an_answer_keeps_every_bit_and_every_reason():
    values, nan = np.array([0.1 + 0.2, np.nan, 1 / 3]), np.nan
    scores = Scores(
        {"a": values, "b": np.full(3, nan)},
        {"a": np.array([True, False, True]), "b": np.zeros(3, bool)},
        {"a": Failure("model_error", "odd", (1,)), "b": Failure("timeout", "late", (0, 1, 2))},
        {"a/graded": np.array([1e-300, nan, -0.0])},
    )
    text = encode_answer(scores, 0.25).model_dump_json()
    assert "NaN" not in text
    back = decode_answer(text.encode(), 3)
    assert values.tobytes() == back.values["a"].tobytes()
    assert scores.details["a/graded"].tobytes() == back.details["a/graded"].tobytes()
    np.testing.assert_array_equal(back.valid["a"], scores.valid["a"])
    assert back.failures == scores.failures and not back.valid["b"].any()
    assert back.seconds == dict.fromkeys(back.values, 0.25)


def failing(rows: bytes) -> bytes:
    """An answer in which the second image failed, but for these rows."""
    failure = b'{"kind": "timeout", "message": "late", "rows": %s}' % rows
    columns = b'"values": [1.0, null], "valid": [true, false]'
    return b'{"rewards": {"a": {%s, "failure": %s}}, "seconds": 0}' % (columns, failure)


def test_an_answer_to_something_else_is_an_error():
    for body in (
        b"<html>proxy</html>",
        b"{}",
        b'{"rewards": {"a": {"values": [1.0], "valid": [true]}}, "seconds": 0}',
        b'{"rewards": {"a": {"values": [1.0, 2.0], "valid": [true]}}, "seconds": 0}',
        b'{"rewards": {"a": {"values": [1.0, NaN], "valid": [true, true]}}, "seconds": 0}',
        b'{"rewards": {"a": {"values": [1.0, null], "valid": [true, true]}}, "seconds": 0}',
        failing(b"[2]"),
        failing(b"[0]"),
        failing(b"[]"),
        failing(b"[-1]"),
    ):
        with pytest.raises(ValueError):
            decode_answer(body, 2)
    assert decode_answer(failing(b"[1, 1]"), 2).failures == {"a": Failure("timeout", "late", (1,))}
