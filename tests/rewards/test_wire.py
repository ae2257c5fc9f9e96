import json
import struct
import tracemalloc

import numpy as np
import pytest

from align_cluster.rewards.image_files import encode
from align_cluster.rewards.limits import Limits, WireError
from align_cluster.rewards.wire import decode_answer, decode_request, encode_answer, encode_request
from align_cluster.types import Failure, Prompt, Scores

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
PROMPTS = [Prompt(0, "a red circle", {"include": [{"class": "circle", "count": 1}]}), Prompt(1, "ein Käfer 🪲")]
LIMITS = Limits(images=4, image_pixels=64, request_pixels=200, prompt_chars=20, json_bytes=2000, body_bytes=20_000)


@pytest.mark.parametrize("encoding", ["png", "webp", "raw"])
def test_a_request_arrives_as_it_was_sent(encoding):
    rewards, images, prompts = decode_request(encode_request(["a", "b"], IMAGES, PROMPTS, encoding), LIMITS)
    assert rewards == ["a", "b"] and images.dtype == np.uint8
    np.testing.assert_array_equal(images, IMAGES)
    assert prompts == PROMPTS and [prompt.metadata for prompt in prompts] == [prompt.metadata for prompt in PROMPTS]


def bomb(kind):
    """A request with a small file whose header says 20,000 x 20,000 or, for WebP, 16,384 x 16,384."""
    file = bytearray(encode(IMAGES[0], kind))
    at, size = (16, struct.pack(">II", 20_000, 20_000)) if kind == "png" else (21, b"\xff\xff\xff\x0f")
    file[at : at + len(size)] = size
    head = {"rewards": ["a"], "prompts": [{"text": "p"}], "images": {"encoding": kind, "sizes": [len(file)]}}
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + bytes(file)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_bomb_is_refused_before_memory_is_taken_for_it(kind):
    body = bomb(kind)
    tracemalloc.start()
    with pytest.raises(WireError, match="pixels"):
        decode_request(body, Limits())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_an_answer_keeps_every_bit_and_every_reason():
    values, nan = np.array([0.1 + 0.2, np.nan, 1 / 3]), np.nan
    scores = Scores(
        {"a": values, "b": np.full(3, nan)},
        {"a": np.array([True, False, True]), "b": np.zeros(3, bool)},
        {"b": Failure("timeout", "late", 3)},
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


@pytest.mark.parametrize(
    "body",
    [
        b"<html>proxy</html>",
        b"{}",
        b'{"rewards": {"a": {"values": [1.0], "valid": [true]}}, "seconds": 0}',
        b'{"rewards": {"a": {"values": [1.0, 2.0], "valid": [true]}}, "seconds": 0}',
        b'{"rewards": {"a": {"values": [1.0, NaN], "valid": [true, true]}}, "seconds": 0}',
        b'{"rewards": {"a": {"values": [1.0, null], "valid": [true, true]}}, "seconds": 0}',
    ],
)
def test_an_answer_to_something_else_is_an_error(body):
    with pytest.raises(ValueError):
        decode_answer(body, 2)


@pytest.mark.parametrize("encoding", ["png", "webp", "raw"])
def test_whatever_is_broken_in_a_request_is_refused_or_harmless(encoding):
    rng, good = np.random.default_rng(0), encode_request(["a"], IMAGES, PROMPTS, encoding)
    for _ in range(300):
        body = bytearray(good)
        for at in rng.integers(0, len(body), rng.integers(1, 4)):
            body[at] = rng.integers(256)
        try:
            _, images, prompts = decode_request(bytes(body[: rng.integers(1, 2 * len(body))]), LIMITS)
        except WireError:
            continue
        assert images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(prompts)
