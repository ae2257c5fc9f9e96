import io
import json
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from align_cluster.rewards.image_files import encode
from align_cluster.rewards.wire import (
    Limits,
    WireError,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from align_cluster.types import Failure, Prompt, Scores

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
PROMPTS = [Prompt(0, "a red circle", {"include": [{"class": "circle", "count": 1}]}), Prompt(1, "ein Käfer 🪲")]
LIMITS = Limits(images=4, image_pixels=64, request_pixels=200, prompt_chars=20, json_bytes=2000, body_bytes=20_000)
PNG, WEBP = (encode(IMAGES[0], kind) for kind in ("png", "webp"))


@pytest.mark.parametrize("encoding", ["png", "webp", "raw"])
def test_a_request_arrives_as_it_was_sent(encoding):
    rewards, images, prompts = decode_request(encode_request(["a", "b"], IMAGES, PROMPTS, encoding), LIMITS)
    assert rewards == ["a", "b"] and images.dtype == np.uint8
    np.testing.assert_array_equal(images, IMAGES)
    assert prompts == PROMPTS and [prompt.metadata for prompt in prompts] == [prompt.metadata for prompt in PROMPTS]


def framed(head, *files):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(files)


def request(*files, encoding="png", prompts=None, **changes):
    """The body of a request that is right but for `changes`; a change to None leaves the key out."""
    head = {
        "rewards": ["a"],
        "prompts": prompts or [{"text": "p"}] * len(files),
        "images": {"encoding": encoding, "sizes": [len(file) for file in files]},
    } | changes
    return framed({key: value for key, value in head.items() if value is not None}, *files)


def raw(height, width, data, count=1):
    return request(data, prompts=[{"text": "p"}] * count, images={"encoding": "raw", "height": height, "width": width})


def saved(mode, format, size=(5, 6), **settings):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format, **settings)
    return buffer.getvalue()


def patched(file, at, data):
    """The file with other bytes at an offset, and, for a PNG, the header's checksum made right again."""
    file = bytearray(file)
    file[at : at + len(data)] = data
    if file[:4] == b"\x89PNG":
        file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    return bytes(file)


def deep(levels):
    return b'{"rewards": ' + b"[" * levels + b"]" * levels + b"}"


GOOD = {"rewards": ["a"], "prompts": [{"text": "p"}], "images": {"encoding": "png", "sizes": [len(PNG)]}}
BAD = {
    "no body": (b"", 422, "starts with 8 bytes"),
    "seven bytes": (b"1234567", 422, "starts with 8 bytes"),
    "pickle": (pickle.dumps({"images": [PNG], "prompts": ["p"]}), 422, "only"),
    "length beyond the body": (struct.pack("<Q", 2**63) + b"{}", 422, "only 2 follow"),
    "huge JSON": (framed(b" " * 2001), 413, "JSON has 2001 bytes"),
    "huge body": (b"\0" * 20_001, 413, "at most 20000"),
    "not UTF-8": (framed(b'{"rewards": ["\xff"]}'), 422, "not UTF-8"),
    "UTF-16": (framed(json.dumps(GOOD).encode("utf-16")), 422, "not UTF-8"),
    "byte order mark": (framed(json.dumps(GOOD).encode("utf-8-sig")), 422, "BOM"),
    "not JSON": (framed(b"{'rewards': []}"), 422, "cannot be read"),
    "no JSON": (framed(b""), 422, "cannot be read"),
    "nested too deeply": (framed(deep(900)), 422, ""),
    "number too long": (framed(b'{"rewards": ' + b"9" * 1900 + b"}"), 422, ""),
    "a list": (framed([GOOD]), 422, "dictionary"),
    "null": (framed(b"null"), 422, ""),
    "a key twice": (framed(b'{"rewards": ["a"], "rewards": ["b"]}'), 422, "twice"),
    "NaN": (request(PNG, prompts=[{"text": "p", "metadata": {"count": float("nan")}}]), 422, "JSON"),
    "infinity": (request(PNG, prompts=[{"text": "p", "metadata": {"count": float("inf")}}]), 422, "JSON"),
    "half a surrogate": (request(PNG, prompts=[{"text": "\ud800"}]), 422, "surrogates"),
    "unknown key": (request(PNG, seed=3), 422, "seed: Extra"),
    "no rewards": (request(PNG, rewards=None), 422, "rewards: Field required"),
    "empty rewards": (request(PNG, rewards=[]), 422, "rewards"),
    "rewards as text": (request(PNG, rewards="a"), 422, "rewards"),
    "a number as reward": (request(PNG, rewards=[1]), 422, "rewards.0"),
    "a reward twice": (request(PNG, rewards=["a", "a"]), 422, "twice"),
    "no prompts": (framed({k: v for k, v in GOOD.items() if k != "prompts"}, PNG), 422, "prompts: Field required"),
    "empty prompts": (framed(GOOD | {"prompts": []}, PNG), 422, "prompts"),
    "prompt as text": (request(PNG, prompts=["p"]), 422, "prompts.0"),
    "prompt null": (request(PNG, prompts=[{"text": None}]), 422, "prompts.0.text"),
    "prompt too long": (request(PNG, prompts=[{"text": "x" * 21}]), 413, "prompt 0 has 21 characters"),
    "metadata as list": (request(PNG, prompts=[{"text": "p", "metadata": []}]), 422, "prompts.0.metadata"),
    "more prompts than images": (request(PNG, prompts=[{"text": "p"}] * 2), 422, "1 images came with 2 prompts"),
    "too many images": (request(*[PNG] * 5), 413, "5 images"),
    "0 images": (request(prompts=[{"text": "p"}]), 422, "images"),
    "5,000 prompts": (framed(b'{"prompts": [' + b"{}," * 5_000), 413, "JSON has"),
    "no images": (request(PNG, images=None), 422, "images: Field required"),
    "no encoding": (request(PNG, images={"sizes": [len(PNG)]}), 422, "images"),
    "JPEG": (request(PNG, images={"encoding": "jpeg", "sizes": [len(PNG)]}), 415, "png"),
    "a format that is a number": (request(PNG, images={"encoding": 3, "sizes": [len(PNG)]}), 415, "images"),
    "negative size": (request(PNG, images={"encoding": "png", "sizes": [-1]}), 422, "greater than 0"),
    "size as text": (request(PNG, images={"encoding": "png", "sizes": [str(len(PNG))]}), 422, "integer"),
    "sizes too small": (request(PNG, images={"encoding": "png", "sizes": [9]}), 422, "add up to 9"),
    "bytes left over": (request(PNG) + b"\0", 422, "add up to"),
    "empty file": (request(b"", prompts=[{"text": "p"}]), 422, "greater than 0"),
    "text as PNG": (request(b"hello"), 422, "image 0: it is no PNG"),
    "WebP as PNG": (request(WEBP), 422, "it is no PNG"),
    "PNG as WebP": (request(PNG, encoding="webp"), 422, "it is no WebP"),
    "truncated PNG": (request(PNG[:-30]), 422, "cannot be decoded"),
    "PNG header only": (request(PNG[:33]), 422, "cannot be decoded"),
    "PNG with broken data": (request(PNG[:60] + bytes(8) + PNG[68:]), 422, "cannot be decoded"),
    "PNG with a wrong checksum": (request(PNG[:30] + b"\0" + PNG[31:]), 422, "cannot be decoded"),
    "PNG without pixels": (request(patched(PNG, 16, bytes(4))), 422, "no pixels"),
    "bomb in a PNG": (request(patched(PNG, 16, struct.pack(">II", 100_000, 100_000))), 413, "100000 x 100000"),
    "PNG over the limit": (request(saved("RGB", "png", (65, 1))), 413, "65 x 1 pixels"),
    "images over the limit": (request(*[saved("RGB", "png", (8, 8))] * 4), 413, "256 pixels"),
    "two sizes": (request(PNG, saved("RGB", "png", (6, 5))), 422, "image 1 has 6 x 5"),
    "second image broken": (request(PNG, PNG[:-30]), 422, "image 1"),
    "grey PNG": (request(saved("L", "png")), 422, "colour type 0"),
    "PNG with alpha": (request(saved("RGBA", "png")), 422, "colour type 6"),
    "palette PNG": (request(saved("P", "png")), 422, "colour type 3"),
    "16-bit PNG": (request(saved("I;16", "png")), 422, "16 bits"),
    "16-bit RGB PNG": (request(patched(PNG, 24, b"\x10")), 422, "16 bits"),
    "animated PNG": (
        request(saved("RGB", "png", save_all=True, append_images=[Image.new("RGB", (5, 6), 9)])),
        422,
        "single RGB image",
    ),
    "truncated WebP": (request(WEBP[:-30], encoding="webp"), 422, "cannot be decoded"),
    "short WebP": (request(WEBP[:20], encoding="webp"), 422, "no WebP"),
    "bomb in a WebP": (request(patched(WEBP, 21, b"\xff\xff\xff\x0f"), encoding="webp"), 413, "16384 x 16384"),
    "bomb in an extended WebP": (
        request(b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff" * 6 + bytes(40), encoding="webp"),
        413,
        "16777216 x 16777216",
    ),
    "bomb in a lossy WebP": (
        request(patched(saved("RGB", "webp", quality=50), 26, b"\xff\x3f\xff\x3f"), encoding="webp"),
        413,
        "16383 x 16383",
    ),
    "WebP with alpha": (request(saved("RGBA", "webp", (6, 6), quality=50), encoding="webp"), 422, ""),
    "animated WebP": (
        request(
            saved("RGB", "webp", save_all=True, append_images=[Image.new("RGB", (5, 6), (9, 9, 9))]), encoding="webp"
        ),
        422,
        "several frames",
    ),
    "unknown WebP": (request(b"RIFF\x40\0\0\0WEBPVP8Q" + bytes(60), encoding="webp"), 422, "no WebP"),
    "raw without height": (
        request(b"", images={"encoding": "raw", "width": 5}, prompts=[{"text": "p"}]),
        422,
        "height",
    ),
    "raw of no height": (raw(0, 5, b""), 422, "greater than 0"),
    "raw of a fraction": (raw(1.5, 2, bytes(9)), 422, "integer"),
    "raw too short": (raw(6, 5, bytes(89)), 422, "needs 90"),
    "raw as float32": (raw(6, 5, bytes(360)), 422, "needs 90"),
    "raw of one image for two prompts": (raw(6, 5, bytes(90), count=2), 422, "needs 180"),
    "raw over the limit": (raw(65, 1, bytes(195)), 413, "1 x 65"),
    "raw bomb": (raw(10**9, 10**9, b""), 413, "1000000000 x 1000000000"),
    "raw of an endless height": (raw(10**200, 1, b""), 413, ""),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_with_its_status_and_a_short_sentence(name):
    body, status, words = BAD[name]
    with pytest.raises(WireError) as caught:
        decode_request(body, LIMITS)
    assert caught.value.status == status and words in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_bomb_is_refused_before_memory_is_taken_for_it():
    bombs = [request(patched(PNG, 16, struct.pack(">II", 20_000, 20_000))), BAD["bomb in a WebP"][0]]
    for bomb in bombs:
        tracemalloc.start()
        with pytest.raises(WireError, match="pixels"):
            decode_request(bomb, Limits())
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
